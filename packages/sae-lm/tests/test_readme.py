from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_example_runs(saved_model: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    small = {
        '"openai-community/gpt2"': repr(str(saved_model)), "transformer.h.6": "model.layers.1", "700_000": "8_200",
        "8_192": "512", '"gpt2-l6"': repr(str(tmp_path / "sae")), "cache_activations=True": "on_exhausted='stop'",
        "lr=1e-3": "lr=1e-3, progress_bar=False",
    }  # fmt: skip
    for mentioned, instead in small.items():
        assert mentioned in code
        code = code.replace(mentioned, instead)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(README), "exec"), {})
    lines = printed.getvalue().splitlines()
    assert lines[0].startswith("window 0: 128 tokens")
    assert [line.split()[0] for line in lines[-2:]] == ["sae", "random"]
    assert (tmp_path / "sae" / "cfg.json").is_file()


def test_no_public_name_is_that_of_a_module() -> None:
    """A module that is imported takes its name in the package, and what went by that name before is gone."""
    import pkgutil

    import sae_lm

    assert {module.name for module in pkgutil.iter_modules(sae_lm.__path__)} & set(sae_lm.__all__) == set()
