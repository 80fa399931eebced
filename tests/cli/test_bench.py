"""`swarmnode bench codec`, run as a user runs it; nothing here asks how fast."""

import json
import sys
from typing import Any

import pytest
import torch

from swarmnode.cli.main import main


def bench(monkeypatch: Any, capsys: Any, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["swarmnode", "bench", "codec", "--rows", "8", *args])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def test_each_codec_has_its_bits_rates_and_errors(monkeypatch: Any, capsys: Any) -> None:
    status, out, _ = bench(
        monkeypatch, capsys, "int8", "int4/32", "topk64of4096/int4", "--runs", "2", "--json"
    )
    report = json.loads(out)
    assert status == 0
    assert (report["device"], report["dtype"], report["num_runs"]) == ("cpu", "float32", 2)
    bits = {each["spec"]: each["wire_bits"] for each in report["codecs"]}
    assert bits == {"int8": 8.125, "int4/32": 4.5, "topk64of4096/int4": 64 / 4096 * 16.125}
    for each in report["codecs"]:
        assert set(each["squared_error"]) == {"gaussian", "student_t3", "outlier"}
        assert all(0 < loss < each["energy_bound"] for loss in each["squared_error"].values())
        for way in ("encode", "decode"):
            rate = each[way]
            assert 0 < rate["slowest"] <= rate["median"] <= rate["fastest"]
            assert each[f"{way}_share"] == rate["median"] / report["copy"]["median"]
    errors = {each["spec"]: each["squared_error"]["gaussian"] for each in report["codecs"]}
    assert errors["int8"] < 0.01 * errors["int4/32"] < 0.01 * errors["topk64of4096/int4"]


def test_the_table_has_a_row_for_each_codec(monkeypatch: Any, capsys: Any) -> None:
    args = ("bf16", "stride0.5/int4", "--dtype", "bfloat16", "--runs", "1")
    status, out, _ = bench(monkeypatch, capsys, *args)
    assert status == 0
    assert "8 x 4096 bfloat16 on cpu" in out
    assert "stride0.5/int4" in out
    assert "gaussian, student_t3, outlier: squared error over squared norm" in " ".join(out.split())


def test_an_unknown_codec_is_refused_in_one_line(monkeypatch: Any, capsys: Any) -> None:
    status, out, err = bench(monkeypatch, capsys, "int4")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "unknown codec 'int4'" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here_is_refused_in_one_line(monkeypatch: Any, capsys: Any) -> None:
    status, _, err = bench(monkeypatch, capsys, "int8", "--device", "cuda")
    assert (status, err.count("\n")) == (2, 1)
    assert "no CUDA device" in err
