"""Write the argument names and plain defaults of SAELens' synthetic functions and classes to `signatures.json`.

Run with the Python of an environment that holds SAELens, in this folder:

    python make_sae_lens_signatures.py
"""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

from sae_lens import synthetic, util  # noqa: E402 - its import is what the filter above silences

NAMES = """
FeatureDictionary orthogonal_initializer orthogonalize_embeddings ActivationGenerator ActivationGenerator.sample
HierarchyNode HierarchyNode.from_dict HierarchyNode.validate HierarchyNode.get_all_feature_indices hierarchy_modifier
zipfian_firing_probabilities linear_firing_probabilities random_firing_probabilities
create_correlation_matrix_from_correlations generate_random_correlations generate_random_correlation_matrix
cosine_similarities SyntheticActivationIterator SyntheticActivationIterator.next_batch SyntheticDataEvalResult
train_toy_sae eval_sae_on_synthetic_data mean_correlation_coefficient init_sae_to_match_feature_dict
find_best_feature_ordering find_best_feature_ordering_from_sae find_best_feature_ordering_across_saes
plot_sae_feature_similarity SyntheticModel SyntheticModel.sample SyntheticModel.sample_with_features SyntheticModel.save
SyntheticModel.load_from_disk SyntheticModel.from_pretrained SyntheticModel.load_from_source SyntheticModel.to
SyntheticModelConfig LowRankCorrelationMatrix generate_random_low_rank_correlation_matrix HierarchyConfig
generate_hierarchy Hierarchy Hierarchy.compute_probability_correction_factors OrthogonalizationConfig
LowRankCorrelationConfig ZipfianFiringProbabilityConfig LinearFiringProbabilityConfig RandomFiringProbabilityConfig
ConstantFiringProbabilityConfig ConstantMagnitudeConfig LinearMagnitudeConfig ExponentialMagnitudeConfig
FoldedNormalMagnitudeConfig FoldedNormalMagnitudeConfig.generate register_firing_probability register_magnitude
get_firing_probability_class get_magnitude_class generate_magnitudes compute_correlation_matrix_stats
compute_low_rank_correlation_matrix_stats compute_superposition_stats CorrelationMatrixStats SuperpositionStats
"""


def plain(parameter: inspect.Parameter) -> object:
    """The default where JSON can hold it, else a word for it."""
    if parameter.default is parameter.empty:
        return "required"
    return [parameter.default] if isinstance(parameter.default, bool | int | float | str | None) else "other"


found = {}
for name in NAMES.split():
    first, _, method = name.partition(".")
    thing = getattr(synthetic, first, None) or getattr(util, first)
    thing = getattr(thing, method) if method else thing
    parameters = [p for p in inspect.signature(thing).parameters.values() if p.name != "self"]
    found[name] = {p.name: plain(p) for p in parameters}
(Path(__file__).parent / "signatures.json").write_text(json.dumps(found, indent=1) + "\n")
