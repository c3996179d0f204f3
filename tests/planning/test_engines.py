from __future__ import annotations

from pathlib import Path

import pytest

from qscope_trl.errors import ConfigError
from qscope_trl.planning.engines import Engine, read_engine
from tests.planning import backbone_plans


def test_engines_are_read_from_accelerates_yaml(tmp_path: Path) -> None:
    folder = backbone_plans.ROOT / "configs" / "accelerate"
    assert read_engine(str(folder / "ddp.yaml"), None) == Engine("ddp", 2)
    assert read_engine(str(folder / "ddp.yaml"), 1) == Engine("single", 1)
    assert read_engine(None, None) == Engine("single", 1)
    assert read_engine(None, 4) == Engine("ddp", 4)
    file = tmp_path / "a.yaml"
    settings = "{fsdp_version: 2, fsdp_offload_params: true}"
    file.write_text(f"distributed_type: FSDP\nnum_processes: 4\nfsdp_config: {settings}")
    assert read_engine(str(file), 8)[:2] == ("fsdp2", 8)
    assert read_engine(str(file), 8).offloads_weights
    file.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu}")
    assert read_engine(str(file), 2) == Engine("zero3", 2, offloads_optimizer=True)
    file.write_text("distributed_type: DEEPSPEED\nnum_processes: '4'\ndeepspeed_config: {zero_stage: '2'}")
    assert read_engine(str(file), None) == Engine("zero2", 4)
    file.write_text("distributed_type: NO")
    assert read_engine(str(file), None) == Engine("single", 1)
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: -1")
    assert read_engine(str(file), 8) == Engine("ddp", 8)


@pytest.mark.parametrize(
    ("word", "is_on"),
    [("'false'", False), ("'no'", False), ("0", False), ("'True'", True), ("'on'", True), ("1", True)],
)
def test_booleans_in_quotes_mean_what_accelerate_reads(word: str, is_on: bool, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    names = ("fsdp_offload_params", "fsdp_activation_checkpointing", "fsdp_reshard_after_forward")
    settings = "".join(f"  {name}: {word}\n" for name in names)
    file.write_text(f"distributed_type: FSDP\nfsdp_config:\n  fsdp_version: '2'\n{settings}")
    assert read_engine(str(file), 2) == Engine("fsdp2", 2, is_on, is_on, is_on, is_on)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No accelerate configuration at '.*'. Examples are in `configs/accelerate/`"),
        ("a: [", "is not YAML"),
        ("- 1", "holds a list, not a mapping from setting to value"),
        ("distributed_type: MEGATRON_LM", "`distributed_type` in '.*' is 'MEGATRON_LM', which is not planned"),
        ("distributed_type: FSDP", "`fsdp_version` in '.*' is 1, and only FSDP2 is planned"),
        (
            "{distributed_type: FSDP, fsdp_config: {fsdp_version: two}}",
            "`fsdp_version` in '.*' is two, and only FSDP2",
        ),
        ("{distributed_type: FSDP, fsdp_config: [1]}", "`fsdp_config` in '.*' is \\[1\\]; it is a mapping, as"),
        (
            "{distributed_type: FSDP, fsdp_config: {fsdp_version: 2, fsdp_offload_params: cpu}}",
            "`fsdp_offload_params` in '.*' is 'cpu'; it is true or false",
        ),
        ("distributed_type: DEEPSPEED", "`zero_stage` in '.*' is None; 1, 2 and 3 are planned"),
        ("num_processes: two", "`num_processes` in '.*' is 'two'; it is a whole number, 1 or more"),
        ("num_processes: -1", "`num_processes` in '.*' is -1; it .*`--num_processes` overrides it"),
    ],
)
def test_engines_that_are_not_planned_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_engine(str(file), None)
