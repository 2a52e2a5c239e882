"""configs/DATA.md: its rows, configuration, tables and file names are those of the code."""

import json
import re
from pathlib import Path

import yaml
from tiny_images import encoded, pixels

from pe_rlhf_jax.config import DataConfig
from pe_rlhf_jax.data import sources
from pe_rlhf_jax.data.converters import FORMATS, convert
from pe_rlhf_jax.data.formats import Reader
from pe_rlhf_jax.data.image_processing import ImageProcessing
from pe_rlhf_jax.data.loading import KINDS
from pe_rlhf_jax.data.sources import Row, Skipped
from pe_rlhf_jax.data.turns import Vision
from pe_rlhf_jax.image_prompt import ImagePrompt

CONFIGS = Path(__file__).parents[2] / "configs"
GUIDE = (CONFIGS / "DATA.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, flags=re.M | re.S)


def test_example_rows_are_read(tokenizer, tmp_path):
    for kind in KINDS:
        [text] = blocks(f"jsonl {kind}")
        rows = [Row(json.loads(line), f"DATA.md:{number}") for number, line in enumerate(text.splitlines(), start=1)]
        assert len(getattr(Reader(tokenizer, Skipped()), kind)(rows)) == len(rows) >= 2
    [pictures] = blocks("jsonl pictures")
    for name in ("pictures/sky.png", "a.png", "b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(pixels()))
    vision = Vision(ImagePrompt("[picture]", "*", 1), ImageProcessing((0, 0, 0), (1, 1, 1), size=(2, 2)))
    rows = [Row(json.loads(line), f"{tmp_path}/DATA.jsonl:{number}") for number, line in enumerate(pictures.splitlines(), start=1)]
    read = Reader(tokenizer, Skipped(), vision=vision).sft(rows)
    assert [len(row.pictures) for row in read] == [1, 2, 1] and [row.texts[0].prompt.count("[picture]") for row in read] == [1, 2, 1]
    [bolt] = blocks("json")
    assert len(list(convert("bolt", "sft", [Row(json.loads(bolt), "DATA.md:1")], Skipped()))) == 1


def test_the_example_configuration_is_valid():
    [text] = blocks("yaml")
    assert DataConfig.model_validate(yaml.safe_load(text)["data"]).group_by == "conversation"


def test_every_format_is_described_with_its_sections():
    rows = re.findall(r"^\| `([a-z-]+)` \| [^|]* \| ([^|]*) \|", GUIDE.split("## Original formats")[1], flags=re.M)
    assert {name: set(re.findall(r"`(\w+)`", kinds)) for name, kinds in rows} == {name: set(kinds) for name, kinds in FORMATS.items()}


def test_every_kind_of_file_is_named():
    table = GUIDE.split("## Sources")[1].split("## ")[0]
    assert not [ending for ending in sources._READERS if f"{ending}`" not in table]


def test_files_of_the_papers_configurations_are_explained():
    task_files = {f for path in (CONFIGS / "paper").glob("*.yaml") for f in re.findall(r"data/[\w/*.-]+", path.read_text())}
    folders = {re.match(r"data/\w+", name)[0] for name in task_files}
    assert {"data/tldr", "data/bolt", "data/taskmaster", "data/vqav2", "data/android_control"} == folders
    assert not [folder for folder in folders if folder not in GUIDE]
    assert not [path.name for path in (CONFIGS / "paper").glob("*.yaml") if f"`{path.name}`" not in GUIDE]
