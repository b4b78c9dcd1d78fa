"""Synthetic data with known features for sae-core.

Importing this package costs next to nothing: every public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_synthetic.absorption import (
        EdgeScores,
        StructureScores,
        structure_scores,
    )
    from sae_synthetic.comparison import (
        Comparison,
        compare_dictionaries,
        compare_saes,
    )
    from sae_synthetic.correlation import (
        CorrelationMatrixInput,
        LowRankCorrelationMatrix,
        create_correlation_matrix_from_correlations,
        generate_random_correlation_matrix,
        generate_random_correlations,
        generate_random_low_rank_correlation_matrix,
        nearest_correlation_matrix,
    )
    from sae_synthetic.evaluation import (
        ActivationScaler,
        SyntheticDataEvalResult,
        eval_sae_on_synthetic_data,
        untrained_like,
    )
    from sae_synthetic.features import (
        FeatureDictionary,
        FeatureDictionaryInitializer,
        cosine_similarities,
        orthogonal_initializer,
        orthogonalize_embeddings,
    )
    from sae_synthetic.firing_magnitudes import (
        ConstantMagnitudeConfig,
        ExponentialMagnitudeConfig,
        FoldedNormalMagnitudeConfig,
        LinearMagnitudeConfig,
        MagnitudeConfig,
        generate_magnitudes,
        get_magnitude_class,
        register_magnitude,
    )
    from sae_synthetic.firing_probabilities import (
        ConstantFiringProbabilityConfig,
        FiringProbabilityConfig,
        LinearFiringProbabilityConfig,
        RandomFiringProbabilityConfig,
        ZipfianFiringProbabilityConfig,
        get_firing_probability_class,
        linear_firing_probabilities,
        random_firing_probabilities,
        register_firing_probability,
        zipfian_firing_probabilities,
    )
    from sae_synthetic.forest import (
        HierarchyNode,
    )
    from sae_synthetic.forest_modifier import (
        HierarchyModifier,
        hierarchy_modifier,
    )
    from sae_synthetic.generator import (
        ActivationGenerator,
    )
    from sae_synthetic.hierarchy import (
        Hierarchy,
        HierarchyConfig,
        generate_hierarchy,
    )
    from sae_synthetic.hub import (
        SyntheticHubError,
    )
    from sae_synthetic.initialization import (
        init_sae_to_match_feature_dict,
    )
    from sae_synthetic.l0_path import (
        L0Path,
    )
    from sae_synthetic.l0_selection import (
        L0Selection,
        best_l0,
        find_l0,
    )
    from sae_synthetic.matching import (
        Matching,
        match_features,
        mean_correlation_coefficient,
        random_dictionary,
    )
    from sae_synthetic.model import (
        SYNTHETIC_MODEL_CONFIG_FILENAME,
        SYNTHETIC_MODEL_HIERARCHY_FILENAME,
        SYNTHETIC_MODEL_WEIGHTS_FILENAME,
        LowRankCorrelationConfig,
        OrthogonalizationConfig,
        SyntheticModel,
        SyntheticModelConfig,
    )
    from sae_synthetic.modifiers import (
        ActivationsModifier,
        ActivationsModifierInput,
        SparseModifier,
    )
    from sae_synthetic.multi_site import (
        MultiSiteModel,
        MultiSiteModelConfig,
    )
    from sae_synthetic.multi_site_evaluation import (
        MultiSiteEvalResult,
        SiteScores,
        eval_sae_on_multi_site_model,
        site_shares,
    )
    from sae_synthetic.multi_site_source import (
        MultiSiteBatches,
        MultiSiteSource,
        MultiSiteSourceConfig,
    )
    from sae_synthetic.plots import (
        find_best_feature_ordering,
        find_best_feature_ordering_across_saes,
        find_best_feature_ordering_from_sae,
        plot_firing,
        plot_pareto,
        plot_recovery,
        plot_sae_feature_similarity,
        plot_similarity,
        plot_training,
    )
    from sae_synthetic.rates import (
        firing_probabilities_for_rates,
    )
    from sae_synthetic.refinement import (
        prune_codes,
    )
    from sae_synthetic.report import (
        Report,
    )
    from sae_synthetic.runner import (
        RUNNER_CONFIG_FILENAME,
        SyntheticSAERunner,
        SyntheticSAERunnerConfig,
        SyntheticSAERunnerResult,
    )
    from sae_synthetic.scores import (
        ClassificationMetrics,
        ClassificationMetricsCalculator,
        DeadLatentsCalculator,
        ExplainedVarianceCalculator,
        L0Calculator,
        SeedConsistency,
        ShrinkageCalculator,
        best_matches,
        compute_classification_metrics,
        decoder_projection,
        feature_uniqueness,
        seed_consistency,
    )
    from sae_synthetic.source import (
        SyntheticActivationIterator,
        SyntheticBatches,
        SyntheticSource,
        SyntheticSourceConfig,
    )
    from sae_synthetic.stats import (
        CorrelationMatrixStats,
        SuperpositionStats,
        compute_correlation_matrix_stats,
        compute_low_rank_correlation_matrix_stats,
        compute_superposition_stats,
    )
    from sae_synthetic.training import (
        Snapshot,
        train_toy_sae,
    )
    from sae_synthetic.upload import (
        upload_synthetic_model_to_huggingface,
    )

__version__ = "0.1.0"

__all__ = [
    "RUNNER_CONFIG_FILENAME",
    "SYNTHETIC_MODEL_CONFIG_FILENAME",
    "SYNTHETIC_MODEL_HIERARCHY_FILENAME",
    "SYNTHETIC_MODEL_WEIGHTS_FILENAME",
    "ActivationGenerator",
    "ActivationScaler",
    "ActivationsModifier",
    "ActivationsModifierInput",
    "ClassificationMetrics",
    "ClassificationMetricsCalculator",
    "Comparison",
    "ConstantFiringProbabilityConfig",
    "ConstantMagnitudeConfig",
    "CorrelationMatrixInput",
    "CorrelationMatrixStats",
    "DeadLatentsCalculator",
    "EdgeScores",
    "ExplainedVarianceCalculator",
    "ExponentialMagnitudeConfig",
    "FeatureDictionary",
    "FeatureDictionaryInitializer",
    "FiringProbabilityConfig",
    "FoldedNormalMagnitudeConfig",
    "Hierarchy",
    "HierarchyConfig",
    "HierarchyModifier",
    "HierarchyNode",
    "L0Calculator",
    "L0Path",
    "L0Selection",
    "LinearFiringProbabilityConfig",
    "LinearMagnitudeConfig",
    "LowRankCorrelationConfig",
    "LowRankCorrelationMatrix",
    "MagnitudeConfig",
    "Matching",
    "MultiSiteBatches",
    "MultiSiteEvalResult",
    "MultiSiteModel",
    "MultiSiteModelConfig",
    "MultiSiteSource",
    "MultiSiteSourceConfig",
    "OrthogonalizationConfig",
    "RandomFiringProbabilityConfig",
    "Report",
    "SeedConsistency",
    "ShrinkageCalculator",
    "SiteScores",
    "Snapshot",
    "SparseModifier",
    "StructureScores",
    "SuperpositionStats",
    "SyntheticActivationIterator",
    "SyntheticBatches",
    "SyntheticDataEvalResult",
    "SyntheticHubError",
    "SyntheticModel",
    "SyntheticModelConfig",
    "SyntheticSAERunner",
    "SyntheticSAERunnerConfig",
    "SyntheticSAERunnerResult",
    "SyntheticSource",
    "SyntheticSourceConfig",
    "ZipfianFiringProbabilityConfig",
    "__version__",
    "best_l0",
    "best_matches",
    "compare_dictionaries",
    "compare_saes",
    "compute_classification_metrics",
    "compute_correlation_matrix_stats",
    "compute_low_rank_correlation_matrix_stats",
    "compute_superposition_stats",
    "cosine_similarities",
    "create_correlation_matrix_from_correlations",
    "decoder_projection",
    "eval_sae_on_multi_site_model",
    "eval_sae_on_synthetic_data",
    "feature_uniqueness",
    "find_best_feature_ordering",
    "find_best_feature_ordering_across_saes",
    "find_best_feature_ordering_from_sae",
    "find_l0",
    "firing_probabilities_for_rates",
    "generate_hierarchy",
    "generate_magnitudes",
    "generate_random_correlation_matrix",
    "generate_random_correlations",
    "generate_random_low_rank_correlation_matrix",
    "get_firing_probability_class",
    "get_magnitude_class",
    "hierarchy_modifier",
    "init_sae_to_match_feature_dict",
    "linear_firing_probabilities",
    "match_features",
    "mean_correlation_coefficient",
    "nearest_correlation_matrix",
    "orthogonal_initializer",
    "orthogonalize_embeddings",
    "plot_firing",
    "plot_pareto",
    "plot_recovery",
    "plot_sae_feature_similarity",
    "plot_similarity",
    "plot_training",
    "prune_codes",
    "random_dictionary",
    "random_firing_probabilities",
    "register_firing_probability",
    "register_magnitude",
    "seed_consistency",
    "site_shares",
    "structure_scores",
    "train_toy_sae",
    "untrained_like",
    "upload_synthetic_model_to_huggingface",
    "zipfian_firing_probabilities",
]

_HOMES = {
    "ActivationGenerator": "generator",
    "ActivationScaler": "evaluation",
    "ActivationsModifier": "modifiers",
    "ActivationsModifierInput": "modifiers",
    "ClassificationMetrics": "scores",
    "ClassificationMetricsCalculator": "scores",
    "Comparison": "comparison",
    "ConstantFiringProbabilityConfig": "firing_probabilities",
    "ConstantMagnitudeConfig": "firing_magnitudes",
    "CorrelationMatrixInput": "correlation",
    "CorrelationMatrixStats": "stats",
    "DeadLatentsCalculator": "scores",
    "EdgeScores": "absorption",
    "ExplainedVarianceCalculator": "scores",
    "ExponentialMagnitudeConfig": "firing_magnitudes",
    "FeatureDictionary": "features",
    "FeatureDictionaryInitializer": "features",
    "FiringProbabilityConfig": "firing_probabilities",
    "FoldedNormalMagnitudeConfig": "firing_magnitudes",
    "Hierarchy": "hierarchy",
    "HierarchyConfig": "hierarchy",
    "HierarchyModifier": "forest_modifier",
    "HierarchyNode": "forest",
    "L0Calculator": "scores",
    "L0Path": "l0_path",
    "L0Selection": "l0_selection",
    "LinearFiringProbabilityConfig": "firing_probabilities",
    "LinearMagnitudeConfig": "firing_magnitudes",
    "LowRankCorrelationConfig": "model",
    "LowRankCorrelationMatrix": "correlation",
    "MagnitudeConfig": "firing_magnitudes",
    "Matching": "matching",
    "MultiSiteBatches": "multi_site_source",
    "MultiSiteEvalResult": "multi_site_evaluation",
    "MultiSiteModel": "multi_site",
    "MultiSiteModelConfig": "multi_site",
    "MultiSiteSource": "multi_site_source",
    "MultiSiteSourceConfig": "multi_site_source",
    "OrthogonalizationConfig": "model",
    "RUNNER_CONFIG_FILENAME": "runner",
    "RandomFiringProbabilityConfig": "firing_probabilities",
    "Report": "report",
    "SYNTHETIC_MODEL_CONFIG_FILENAME": "model",
    "SYNTHETIC_MODEL_HIERARCHY_FILENAME": "model",
    "SYNTHETIC_MODEL_WEIGHTS_FILENAME": "model",
    "SeedConsistency": "scores",
    "ShrinkageCalculator": "scores",
    "SiteScores": "multi_site_evaluation",
    "Snapshot": "training",
    "SparseModifier": "modifiers",
    "StructureScores": "absorption",
    "SuperpositionStats": "stats",
    "SyntheticActivationIterator": "source",
    "SyntheticBatches": "source",
    "SyntheticDataEvalResult": "evaluation",
    "SyntheticHubError": "hub",
    "SyntheticModel": "model",
    "SyntheticModelConfig": "model",
    "SyntheticSAERunner": "runner",
    "SyntheticSAERunnerConfig": "runner",
    "SyntheticSAERunnerResult": "runner",
    "SyntheticSource": "source",
    "SyntheticSourceConfig": "source",
    "ZipfianFiringProbabilityConfig": "firing_probabilities",
    "best_l0": "l0_selection",
    "best_matches": "scores",
    "compare_dictionaries": "comparison",
    "compare_saes": "comparison",
    "compute_classification_metrics": "scores",
    "compute_correlation_matrix_stats": "stats",
    "compute_low_rank_correlation_matrix_stats": "stats",
    "compute_superposition_stats": "stats",
    "cosine_similarities": "features",
    "create_correlation_matrix_from_correlations": "correlation",
    "decoder_projection": "scores",
    "eval_sae_on_multi_site_model": "multi_site_evaluation",
    "eval_sae_on_synthetic_data": "evaluation",
    "feature_uniqueness": "scores",
    "find_best_feature_ordering": "plots",
    "find_best_feature_ordering_across_saes": "plots",
    "find_best_feature_ordering_from_sae": "plots",
    "find_l0": "l0_selection",
    "firing_probabilities_for_rates": "rates",
    "generate_hierarchy": "hierarchy",
    "generate_magnitudes": "firing_magnitudes",
    "generate_random_correlation_matrix": "correlation",
    "generate_random_correlations": "correlation",
    "generate_random_low_rank_correlation_matrix": "correlation",
    "get_firing_probability_class": "firing_probabilities",
    "get_magnitude_class": "firing_magnitudes",
    "hierarchy_modifier": "forest_modifier",
    "init_sae_to_match_feature_dict": "initialization",
    "linear_firing_probabilities": "firing_probabilities",
    "match_features": "matching",
    "mean_correlation_coefficient": "matching",
    "nearest_correlation_matrix": "correlation",
    "orthogonal_initializer": "features",
    "orthogonalize_embeddings": "features",
    "plot_firing": "plots",
    "plot_pareto": "plots",
    "plot_recovery": "plots",
    "plot_sae_feature_similarity": "plots",
    "plot_similarity": "plots",
    "plot_training": "plots",
    "prune_codes": "refinement",
    "random_dictionary": "matching",
    "random_firing_probabilities": "firing_probabilities",
    "register_firing_probability": "firing_probabilities",
    "register_magnitude": "firing_magnitudes",
    "seed_consistency": "scores",
    "site_shares": "multi_site_evaluation",
    "structure_scores": "absorption",
    "train_toy_sae": "training",
    "untrained_like": "evaluation",
    "upload_synthetic_model_to_huggingface": "upload",
    "zipfian_firing_probabilities": "firing_probabilities",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae_synthetic' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sae_synthetic.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
