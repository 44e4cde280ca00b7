"""Each kind of bad input to the command line: one line on stderr, status 2, nothing written."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from quota_jax.cli import main
from tests.tiny_models import draw_picture, write_tiny_llava


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, full, w4 and a.png, made once; tests work on copies."""
    folder = tmp_path_factory.mktemp("refusals")
    write_tiny_llava(folder / "hf", num_layers=3, max_position_embeddings=64)
    draw_picture().save(folder / "a.png")
    assert main(["convert", str(folder / "hf"), "--out", str(folder / "full")]) == 0
    assert main(["calibrate", str(folder / "full"), "--out", str(folder / "w4")]) == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made` as the working directory."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def refuse(capsys: pytest.CaptureFixture[str], folder: Path, *argv: str) -> str:
    """The error line of a command that must fail and leave everything as it was."""
    before = snapshot(folder)
    capsys.readouterr()
    status = main(list(argv))
    out, err = capsys.readouterr()
    assert status == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert snapshot(folder) == before
    return err.removeprefix("error: ").rstrip("\n")


ASK = ("--prompt", "what is the color")

# command line -> what its error line names
CASES = [
    # arguments
    ("convertt hf --out x", "no command 'convertt'"),
    ("convert hf --out x --bogus 1", "--bogus"),
    ("convert hf", "--out"),
    ("convert hf --out x --dtype int8", "'int8'"),
    ("recipe full --layers a", "--layers"),
    ("inspect full extra", "extra"),
    ("generate full", "--prompt"),
    ("generate full --prompt a --max-new many", "--max-new"),
    # convert and export
    ("convert nowhere --out x", "nowhere"),
    ("convert a.png --out x", "a.png is a file"),
    ("convert hf --out full", "full already exists"),
    ("convert full --out x", "full"),
    ("export full --out hf", "already exists"),
    ("export w4 --out x", "is quantized (W4A4KV4)"),
    ("export full --out no/such/x", "is not a folder"),
    ("export hf --out x", "manifest.json"),
    # calibrate
    ("calibrate hf --out x", "manifest.json"),
    ("calibrate nowhere --out x", "nowhere: no such checkpoint folder"),
    ("calibrate w4 --out x", "already quantized"),
    ("calibrate full --out w4", "w4"),
    ("calibrate full --out x --bits W4", "'W4'"),
    ("calibrate full --out x --bits W5A4", "got 5"),
    ("calibrate full --out x --bits W16A16", "quantizes nothing"),
    ("calibrate full --out x --method magic", "'magic'"),
    ("calibrate full --out x --modules head", "'head'"),
    ("calibrate full --out x --modules vision vision", "each module once"),
    # recipe
    ("recipe full --keep 1.5", "got 1.5"),
    ("recipe full --keep nan", "got nan"),
    ("recipe full --keep 0.3 --layers 7 --write", "layer 7, but the decoder has 3"),
    ("recipe full --keep 0.3 --layers 1 1 --write", "not in order at layer 1"),
    ("recipe full --keep 0.3 --layers -1", "got -1"),
    ("recipe full --keep 0.3 --selector best", "'best'"),
    ("recipe full --keep 0.3 --layers 0 --point input", "cannot stand at 'input'"),
    ("recipe full --keep 0.3 --layers 1 --selector quota", "add --redistribute"),
    ("recipe full --keep 0.3 --layers 1 --redistribute", "belong to the selector 'quota'"),
    ("recipe full --keep 0.3 --layers 1 --selector div_prune", "its layer is 0, got 1"),
    ("recipe full --write", "--keep"),
    ("recipe full --layers 1", "--keep"),
    ("recipe full --none --keep 0.5", "--none"),
    ("recipe nowhere --keep 0.3 --write", "nowhere"),
    # inspect and verify
    ("inspect", "name a checkpoint"),
    ("inspect nowhere", "nowhere"),
    ("verify nowhere", "nowhere"),
    ("verify full --against nowhere", "nowhere"),
    # generate and chat
    ("generate nowhere --prompt a", "nowhere"),
    ("generate hf --prompt a", "manifest.json"),
    ("generate full --prompt a --image nowhere.png", "nowhere.png"),
    ("generate full --prompt a --image hf/config.json", "hf/config.json"),
    ("generate full --prompt a --image https://example.org/a.png", "not downloaded"),
    ("generate full --prompt a --image a.png --template raw", "0 <image> placeholders but 1 image"),
    ("generate full --prompt <image>a --template raw", "1 <image> placeholder but 0 images"),
    ("generate full --prompt <image>a --image a.png", "placeholder '<image>'"),
    ("generate full --prompt a --template zephyr", "'zephyr'"),
    ("generate full --prompt a --max-new 100", "max_position_embeddings 64"),
    ("generate full --prompt a --max-new 0", "max_new"),
    ("generate full --prompt a --max-new -3", "got -3"),
    ("generate full --prompt a --temperature -1", "temperature"),
    ("generate full --prompt a --temperature nan", "temperature"),
    ("generate full --prompt a --top-p 2", "top_p"),
    ("generate full --prompt a --top-k -1", "top_k"),
    ("generate full --prompt a --seed 99999999999", "seed"),
    ("generate full --prompt a --keep 0.5 --recipe-none", "exclude each other"),
    ("generate full --prompt a --keep -0.1", "got -0.1"),
    ("generate full --prompt a --layers 1", "--keep"),
    ("chat nowhere", "nowhere"),
    ("chat full --image nowhere.png", "nowhere.png"),
    ("chat full --temperature -1", "temperature"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "named"), CASES, ids=[line for line, _ in CASES])
def test_bad_arguments(line: str, named: str, here: Path, capsys) -> None:
    assert named in refuse(capsys, here, *line.split())


def test_too_long_a_prompt(here: Path, capsys) -> None:
    prompt = "what is the color " * 30
    line = refuse(capsys, here, "generate", "full", "--prompt", prompt, "--image", "a.png")
    assert "prompt 0 is too long" in line
    assert "max_position_embeddings 64" in line


def damaged_picture(path: Path) -> None:
    picture = Path("a.png").read_bytes()
    path.write_bytes(picture[: len(picture) // 2])


def huge_picture(path: Path) -> None:
    """A PNG header of 60,000 x 60,000 pixels; a decoder that trusts it needs 10 GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def large_picture(path: Path) -> None:
    """Just beyond the limit on pixels, below Pillow's own error."""
    Image.new("1", (9_500, 9_500)).save(path)


@pytest.mark.parametrize("make", [damaged_picture, huge_picture, large_picture])
def test_unreadable_and_huge_pictures(make, here: Path, capsys) -> None:
    make(Path("bad.png"))
    for command in (("generate", "full", *ASK, "--image"), ("chat", "full", "--image")):
        assert "bad.png" in refuse(capsys, here, *command, "bad.png")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, Path.unlink])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_hugging_face_folder(damage, name: str, here: Path, capsys) -> None:
    damage(here / "hf" / name)
    refuse(capsys, here, "convert", "hf", "--out", "x")


def test_another_model(here: Path, capsys) -> None:
    path = here / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "bert"}))
    assert "bert" in refuse(capsys, here, "convert", "hf", "--out", "x")


def test_pickled_weights_name_the_way_out(here: Path, capsys) -> None:
    (here / "hf" / "model.safetensors").rename(here / "hf" / "pytorch_model.bin")
    assert "save_pretrained" in refuse(capsys, here, "convert", "hf", "--out", "x")


def state_file(checkpoint: Path) -> Path:
    """The largest file of a block."""
    files = (path for path in (checkpoint / "state").rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", [cut, Path.unlink])
@pytest.mark.parametrize("name", ["manifest.json", "config.json", "recipe.json", "state"])
def test_damaged_checkpoint(damage, name: str, here: Path, capsys) -> None:
    damage(state_file(here / "full") if name == "state" else here / "full" / name)
    picture = ("--image", "a.png")
    for command in (
        ("generate", "full", *ASK, *picture),
        ("chat", "full", *picture),
        ("calibrate", "full", "--out", "x"),
        ("export", "full", "--out", "x"),
        ("recipe", "full", "--keep", "0.5", "--write"),
        ("inspect", "full"),
        ("verify", "full"),
    ):
        assert "full" in refuse(capsys, here, *command)


def test_a_changed_byte_is_found(here: Path, capsys) -> None:
    flip(state_file(here / "full"))
    assert "checksum" in refuse(capsys, here, "generate", "full", *ASK)
    assert main(["verify", "full"]) == 1
    assert "failed" in capsys.readouterr().out.splitlines()[0]


def test_a_forged_recipe_is_refused(here: Path, capsys) -> None:
    path = here / "full" / "recipe.json"
    path.write_text(path.read_text().replace('"keep"', '"renumber"'))
    assert "recipe.json" in refuse(capsys, here, "generate", "full", *ASK)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_missing_tokenizer_or_preprocessor(name: str, here: Path, capsys) -> None:
    (here / "hf" / name).unlink()
    assert main(["convert", "hf", "--out", "bare"]) == 0
    assert "bare" in refuse(capsys, here, "generate", "bare", *ASK)


def test_unfinished_checkpoint_says_how_to_go_on(here: Path, capsys) -> None:
    (here / "full").rename(here / "x.partial")
    (here / "x.partial" / "manifest.json").unlink()
    assert "run its command again" in refuse(capsys, here, "inspect", "x")
    assert "unfinished" in refuse(capsys, here, "generate", "x.partial", *ASK)


def test_unwritable_place(here: Path, capsys) -> None:
    (here / "file").write_text("not a folder")
    refuse(capsys, here, "convert", "hf", "--out", "file/x")
    refuse(capsys, here, "calibrate", "full", "--out", "file/x")


def test_a_defect_is_one_line_too(here: Path, capsys, monkeypatch) -> None:
    import quota_jax.quant.calibrate as module

    def fail(*args, **kwargs):
        raise RuntimeError("several\nlines")

    monkeypatch.setattr(module, "calibrate", fail)
    assert main(["calibrate", "full", "--out", "x"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == ("error: internal: RuntimeError: several lines (QUOTA_JAX_DEBUG=1 shows where)\n")
    monkeypatch.setenv("QUOTA_JAX_DEBUG", "1")
    with pytest.raises(RuntimeError, match="several"):
        main(["calibrate", "full", "--out", "x"])


def test_a_foreign_converters_package_is_named(here: Path, capsys, monkeypatch) -> None:
    import sys
    import types

    monkeypatch.setitem(sys.modules, "converters", types.ModuleType("converters"))
    line = refuse(capsys, here, "convert", "hf", "--out", "x")
    assert "another package named 'converters'" in line
