"""The command line at work: every command on tiny random models, against the library's own
answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quota_jax as qj
from pallas_kernels.dispatch import OPERATIONS
from quota_jax.checkpoint import open_checkpoint
from quota_jax.cli import COMMANDS, main
from quota_jax.cli.parsing import parse
from quota_jax.cli.recipe import ShowRecipe
from tests.tiny_models import assert_same_tensors, draw_picture, read_folder, write_tiny_llava

QUESTION = "what is the color"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with hf (Hugging Face), full and w4 (checkpoints, made by the commands), a.png,
    b.png."""
    folder = tmp_path_factory.mktemp("cli")
    write_tiny_llava(folder / "hf", num_layers=4, image_size=56)
    for seed, name in enumerate(("a.png", "b.png")):
        draw_picture(seed).save(folder / name)
    assert main(["convert", str(folder / "hf"), "--out", str(folder / "full")]) == 0
    calibrate = ["calibrate", str(folder / "full"), "--out", str(folder / "w4")]
    assert main([*calibrate, "--bits", "W4A8KV4"]) == 0
    return folder


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]):
    """Runs a command that must succeed without a word on stderr; returns its stdout."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        status = main([str(part) for part in argv])
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        return out

    return run


def library_answer(path: Path, turns: list, recipe: qj.Recipe | None = None, **options) -> str:
    vlm = qj.load(path)
    batch = vlm.processor.chat([turns])
    made = qj.generate(
        vlm.model,
        batch,
        recipe=recipe or vlm.recipe,
        stop_ids=vlm.processor.stop_ids,
        **options,
    )
    return vlm.processor.decode(made.tokens, made.lengths)[0].strip()


def user(text: str, *pictures: Path) -> dict:
    images = [{"type": "image", "image": str(path)} for path in pictures]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def test_calibrate_writes_the_bits_asked_for(files: Path, output) -> None:
    assert open_checkpoint(files / "w4").quantization.label == "W4A8KV4"
    out = files / "projector_only"
    text = output(
        "calibrate", files / "full", "--out", out, "--bits", "w8a8", "--modules", "projector"
    )
    assert text.startswith(f"wrote {out}: llava, 4 decoder layers, W8A8KV16, ")
    quantization = open_checkpoint(out).quantization
    assert (quantization.label, quantization.modules) == ("W8A8KV16", ("projector",))
    checkpoint = open_checkpoint(out)
    names = [name for block in checkpoint.block_names for name in checkpoint.block_specs(block)]
    coded = sorted(name for name in names if name.endswith(".codes"))
    assert coded == ["projector.linear_1.codes", "projector.linear_2.codes"]


def test_convert_casts_and_export_gives_the_tensors_back(files: Path, output) -> None:
    text = output("convert", files / "hf", "--out", files / "half", "--dtype", "float16")
    assert text.startswith(f"wrote {files / 'half'}: llava, 4 decoder layers, float16, ")
    assert open_checkpoint(files / "half").dtype == "float16"
    text = output("export", files / "full", "--out", files / "back")
    assert text.startswith(f"wrote {files / 'back'}: ")
    assert_same_tensors(read_folder(files / "back"), read_folder(files / "hf"))


def test_recipe_shows_stores_and_clears(files: Path, output) -> None:
    path = files / "half_recipe"
    output("convert", files / "hf", "--out", path)
    options = ("--keep", 0.3, "--layers", 1, 2, "--selector", "stride", "--positions", "renumber")
    shown = output("recipe", path, *options)
    assert open_checkpoint(path).recipe.is_none
    assert "wrote" not in shown
    wanted = qj.Recipe.uniform(
        num_layers=4, layers=(1, 2), keep=0.3, selector="stride", positions="renumber"
    )
    assert output("recipe", path, *options, "--write") == shown + f"wrote {path}/recipe.json\n"
    assert open_checkpoint(path).recipe == wanted
    assert output("recipe", path) == shown
    rows = [line.split() for line in shown.splitlines()[2:6]]
    # 16 tokens; attention of layer 1 sees all, of layer 2 ceil(.65 * 16), of layer 3 ceil(.3 * 16)
    assert [(row[0], row[-3]) for row in rows] == [
        ("0", "16"),
        ("1", "16"),
        ("2", "11"),
        ("3", "5"),
    ]

    output("recipe", path, "--none")
    assert open_checkpoint(path).recipe == qj.Recipe.none(4)


def test_default_layers_lie_where_the_paper_has_them(files: Path, output) -> None:
    shown = output("recipe", files / "full", "--keep", 0.5)
    stages = [line.split()[0] for line in shown.splitlines() if "text_attention" in line]
    assert stages == ["1", "2", "3"]


def test_inspect_counts_parameters_and_bytes(files: Path, output) -> None:
    parameters = sum(array.size for array in read_folder(files / "hf").values())
    for name in ("full", "w4"):
        text = output("inspect", files / name)
        assert f"{parameters:,}" in next(
            line for line in text.splitlines() if line.startswith("parameters")
        )
        checkpoint = open_checkpoint(files / name)
        for block in checkpoint.block_names:
            assert any(line.startswith(block) for line in text.splitlines())
    assert "W4A8KV4 by rtn" in text
    assert f"{sum(checkpoint.sizes()['blocks'].values()) / 1000:.1f} kB of arrays" in text


def test_inspect_names_the_kernels(output) -> None:
    text = output("inspect", "--kernels")
    assert "kernels on cpu" in text
    rows = [line.split() for line in text.splitlines()[3:]]
    assert {(row[0], row[-1]) for row in rows} == {(name, "xla") for name in OPERATIONS}


def test_verify_reports_each_check(files: Path, output) -> None:
    rows = [line.split()[:2] for line in output("verify", files / "w4").splitlines()]
    assert rows == [
        ["checksums", "passed"],
        ["coverage", "passed"],
        ["tensors", "skipped"],
        ["logits", "skipped"],
    ]


@pytest.mark.torch
def test_verify_against_the_source_compares_logits(files: Path, output) -> None:
    text = output("verify", files / "full", "--against", files / "hf")
    rows = [line.split()[:2] for line in text.splitlines()]
    assert rows == [[n, "passed"] for n in ("checksums", "coverage", "tensors", "logits")]


def test_a_failed_check_is_status_1(files: Path, tmp_path: Path, capsys) -> None:
    other = write_tiny_llava(tmp_path / "other", num_layers=4, image_size=56, seed=1)
    assert main(["verify", str(files / "full"), "--against", str(other)]) == 1
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["checksums", "passed"] in rows
    assert ["tensors", "failed"] in rows


@pytest.mark.parametrize("name", ["full", "w4"])
def test_generate_gives_the_librarys_answer(files: Path, output, name: str) -> None:
    pictures = (files / "a.png", files / "b.png")
    expected = library_answer(files / name, [user(QUESTION, *pictures)], max_new_tokens=6)
    asked = ("generate", files / name, "--prompt", QUESTION, "--max-new", 6)
    asked += tuple(part for path in pictures for part in ("--image", path))
    assert output(*asked).strip() == expected
    assert output(*asked, "--stream").strip() == expected
    assert output(*asked, "--recipe-none").strip() == expected  # none is stored


@pytest.mark.slow
def test_generate_with_another_recipe_and_sampling(files: Path, output) -> None:
    picture = files / "a.png"
    recipe = qj.Recipe.uniform(num_layers=4, layers=(0, 1), keep=0.1)
    options = {"max_new_tokens": 8, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 5}
    expected = library_answer(files / "full", [user(QUESTION, picture)], recipe, **options)
    asked = ("generate", files / "full", "--prompt", QUESTION, "--image", picture, "--max-new", 8)
    sampled = (*asked, "--temperature", 1.5, "--top-k", 20, "--top-p", 0.9, "--seed", 5)
    assert output(*sampled, "--keep", 0.1, "--layers", 0, 1).strip() == expected
    greedy = library_answer(files / "full", [user(QUESTION, picture)], max_new_tokens=8)
    assert output(*asked).strip() == greedy
    assert greedy != expected


def test_generate_raw_prompt_equals_its_template(files: Path, output) -> None:
    asked = ("generate", files / "full", "--image", files / "a.png", "--max-new", 6)
    raw = f"USER: <image>\n{QUESTION} ASSISTANT:"
    by_hand = output(*asked, "--template", "raw", "--prompt", raw)
    assert output(*asked, "--template", "llava", "--prompt", QUESTION) == by_hand
    bare = output(*asked, "--template", "raw", "--prompt", f"<image>{QUESTION}")
    assert bare != by_hand


def chat(monkeypatch: pytest.MonkeyPatch, lines: list[str], *argv: object) -> int:
    replies = iter(lines)

    def read(prompt: str = "") -> str:
        assert prompt == ""  # no prompt is shown to a pipe
        line = next(replies, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    return main(["chat", *map(str, argv)])


def test_chat_remembers_the_conversation(files: Path, monkeypatch, capsys) -> None:
    first = user(QUESTION, files / "a.png")
    answer = library_answer(files / "full", [first], max_new_tokens=5)
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    second = user("and here", files / "b.png")
    expected = library_answer(files / "full", [first, said, second], max_new_tokens=5)
    fresh = library_answer(files / "full", [user("and here")], max_new_tokens=5)
    lines = [QUESTION, "", f"/image {files / 'b.png'}", "and here", "/reset", "and here"]
    status = chat(monkeypatch, lines, files / "full", "--image", files / "a.png", "--max-new", 5)
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    assert [line.strip() for line in out.splitlines()] == [answer, expected, fresh]


def test_chat_goes_on_after_a_refused_line(files: Path, monkeypatch, capsys) -> None:
    lines = ["/image nowhere.png", "/picture x", "word " * 2000, QUESTION, "/quit", "never asked"]
    status = chat(monkeypatch, lines, files / "full", "--max-new", 5)
    out, err = capsys.readouterr()
    assert status == 2
    errors = err.splitlines()
    assert len(errors) == 3
    assert errors[0] == "error: nowhere.png: No such file or directory"
    assert errors[1].startswith("error: unknown command /picture")
    assert "max_position_embeddings" in errors[2]
    assert out.strip() == library_answer(files / "full", [user(QUESTION)], max_new_tokens=5)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_that_parses(name: str, capsys) -> None:
    assert main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    example = next(line.strip() for line in out.splitlines() if line.startswith("  quota-jax"))
    assert example.startswith(f"quota-jax {name} ")


def test_examples_are_complete_commands() -> None:
    import importlib
    import shlex

    kinds = {}
    for name, (where, _) in COMMANDS.items():
        module, _, attribute = where.partition(":")
        kinds[name] = getattr(importlib.import_module(f"quota_jax.cli.{module}"), attribute)
    for name, kind in kinds.items():
        _, _, examples = kind.__doc__.partition("For example:")
        commands = examples.replace("\\", " ").replace("\n", " ").split("quota-jax ")[1:]
        assert any(command.startswith(name) for command in commands), name
        for command in commands:
            other, *words = shlex.split(command)
            assert parse(kinds[other], other, words) is not None


def test_overview_and_version(capsys) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"quota-jax {qj.__version__}\n")


def test_parse_reads_typed_options() -> None:
    command = parse(ShowRecipe, "recipe", ["c", "--keep", "0.3", "--layers", "2", "3"])
    assert command == ShowRecipe(checkpoint=Path("c"), keep=0.3, layers=(2, 3))


def clean_environment() -> dict[str, str]:
    """What a user's shell has: none of the settings that make libraries quiet in tests."""
    quieting = ("TRANSFORMERS_", "HF_HUB_DISABLE", "TF_CPP", "TOKENIZERS_")
    return {key: value for key, value in os.environ.items() if not key.startswith(quieting)}


def test_help_imports_no_heavy_library(root: Path) -> None:
    code = (
        "import sys; from quota_jax.cli import COMMANDS, main\n"
        "for name in COMMANDS: assert main([name, '--help']) == 0\n"
        "heavy = {'jax', 'flax', 'transformers', 'orbax', 'torch', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_prints_the_answer_and_nothing_else(files: Path, root: Path, output) -> None:
    asked = ["generate", str(files / "w4"), "--prompt", QUESTION, "--image", str(files / "a.png")]
    command = [sys.executable, "-m", "quota_jax.cli", *asked, "--max-new", "5"]
    done = subprocess.run(
        command, cwd=root, env=clean_environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == output(*asked, "--max-new", 5)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Children started inside heed SIGINT, also where a shell started the tests in the background:
    it ignores the signal, and processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_interrupted_chat_is_one_line_and_130(files: Path, root: Path) -> None:
    command = [sys.executable, "-m", "quota_jax.cli", "chat", str(files / "full"), "--max-new", "2"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=root, env=clean_environment(), stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("hello\n")
        process.stdin.flush()
        assert process.stdout.readline()  # answered: it now waits for the next line
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "error: interrupted\n"


def test_a_reader_that_goes_away_is_no_traceback(files: Path, root: Path) -> None:
    command = [sys.executable, "-m", "quota_jax.cli", "inspect", str(files / "full")]
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr is not None
        assert process.stderr.read() == ""
