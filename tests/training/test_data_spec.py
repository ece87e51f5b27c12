"""What a data configuration accepts; it costs no torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from sparsekv.config import parse_config
from sparsekv.errors import ConfigError
from sparsekv.training.data_spec import FAMILIES, DataConfig
from sparsekv.training.selfsup import MAKERS


def test_weights_and_makers_name_the_same_families() -> None:
    assert set(FAMILIES) == set(MAKERS)
    assert sum(FAMILIES.values()) == pytest.approx(1)


def test_a_mix_needs_no_kind_and_a_path_no_list() -> None:
    config = parse_config(DataConfig, {"mix": [{"kind": "text", "path": "a.txt", "weight": 2}, {}]})
    assert (config.kind, config.mix[0].path, config.mix[1].kind) == ("mix", ["a.txt"], "selfsup")
    assert config.mix[1].path == ["book_train"]


def test_families_of_weight_zero_are_not_drawn() -> None:
    assert DataConfig(families={"recall": 2, "cloze": 0}).family_weights() == {"recall": 2}
    assert DataConfig().family_weights() == {name: w for name, w in FAMILIES.items() if w}
    assert "detail" not in DataConfig().family_weights(), "data made by default stay what they were"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "txt"}, "kind.*'text', 'qa', 'selfsup' or 'mix'"),
        ({"kind": "text", "seq_len": 8}, "seq_len.*greater than or equal to 32.*got 8"),
        ({"context_tokens": 10}, "context_tokens.*greater than or equal to 64.*got 10"),
        (
            {"context_tokens": 100, "min_context_tokens": 200},
            "min_context_tokens must be at most.*100, got 200",
        ),
        ({"families": {"recal": 1}}, "unknown family 'recal' .did you mean 'recall'"),
        ({"families": {"recall": -1}}, "weight of 'recall' must be 0 or more, got -1"),
        ({"families": {"recall": 0}}, "all weights are 0"),
        ({"path": "book_eval"}, "what the benchmarks read; train on 'book_train'"),
        ({"path": []}, "list is empty"),
        ({"kind": "qa", "detokenize": "wikitext"}, "detokenize is for kind 'text' or 'selfsup'.*not 'qa'"),
        ({"mix": [{}], "detokenize": "wikitext"}, "detokenize is for kind 'text' or 'selfsup'.*not 'mix'"),
        ({"detokenize": "wiki"}, "detokenize.*'wikitext'"),
        ({"kind": "mix"}, "kind is 'mix' and mix has 0 parts"),
        ({"kind": "text", "mix": [{}]}, "kind is 'text' and mix has 1 parts"),
        ({"mix": [{"kind": "text", "path": "a/b", "streaming": True}]}, "streaming is not possible in a mix"),
        ({"mix": [{"weight": 0}]}, r"mix\[0\].weight.*greater than 0"),
        ({"n_sample": 3}, "unknown key 'n_sample' .did you mean 'n_samples'"),
    ],
)
def test_mistakes_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(DataConfig, settings)
    assert "\n" not in str(caught.value)


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, sparsekv.training.data_spec, sparsekv.training.selfsup; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
