"""The built-in scripts as their user meets them: real processes, judged by what they print."""

import ast
import functools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import halfstep.workloads
from halfstep.workloads import gpt

FOLDER = Path(halfstep.workloads.__file__).parent
SCRIPTS = ["gpt.py", "digits_cnn.py", "digits_gan.py"]
SMALL_GPT = "--layers 2 --width 32 --heads 2 --context 32 --batch 8 --lr 1e-2 --warmup 5 --device cpu --log-every 1"
SHORT = {
    "gpt.py": f"{SMALL_GPT} --steps 40 --eval-every 5",
    "digits_cnn.py": "--epochs 3 --channels 8 --device cpu",
    "digits_gan.py": "--steps 40 --channels 16 --log-every 1 --device cpu",
}


def start(*command: str) -> subprocess.CompletedProcess[str]:
    """A Python process with one thread, for several run at once, and with warnings as errors."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
    command = (sys.executable, "-W", "error::UserWarning", *command)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def without_times(printed: str) -> list[str]:
    return [re.sub(r"\s+\d+ ms$", "", line) for line in printed.splitlines()]


def lines(script: str, arguments: str) -> list[str]:
    """What a run that must succeed prints, without the step times."""
    done = start(str(FOLDER / script), *arguments.split())
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return without_times(done.stdout)


@functools.cache
def three_runs(script: str) -> list[list[str]]:
    """The same short run twice with seed 3, and once with seed 4."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda seed: lines(script, f"{SHORT[script]} --seed {seed}"), (3, 3, 4)))


def values(name: str, printed: list[str]) -> list[float]:
    """The number after ``name`` in each line that has it, in order."""
    found = (re.search(rf"{re.escape(name)} +([\d.]+)", line) for line in printed)
    return [float(match[1]) for match in found if match]


@pytest.mark.parametrize("script", SCRIPTS)
def test_knows_nothing_of_halfstep(script: str) -> None:
    tree = ast.parse((FOLDER / script).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.partition(".")[0] for name in imported}
    assert "torch" in roots
    assert roots <= {*sys.stdlib_module_names, "torch", "sklearn"}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_seed_decides_every_printed_number(script: str) -> None:
    first, again, other = three_runs(script)
    assert again == first
    assert len(other) == len(first)
    assert other != first


@pytest.mark.parametrize("run", [0, 2])
def test_gpt_learns(run: int) -> None:
    printed = three_runs("gpt.py")[run]
    training, validation = values("  loss", printed), values("validation loss", printed)
    assert (len(training), len(validation)) == (40, 8)
    assert training[0] == pytest.approx(5.545, abs=0.2)  # ln 256: nothing is known of the next byte
    assert sum(training[-5:]) / 5 < 3.6
    assert validation[-1] < validation[0] - 0.5


@pytest.mark.parametrize("run", [0, 2])
def test_cnn_classifies_digits(run: int) -> None:
    printed = three_runs("digits_cnn.py")[run]
    losses = values("loss", printed)
    assert losses[0] > losses[1] > losses[2]
    assert values("test accuracy", printed)[0] > 0.9


@pytest.mark.parametrize("run", [0, 2])
def test_gan_discriminator_tells_real_from_generated(run: int) -> None:
    printed = three_runs("digits_gan.py")[run]
    loss_d, loss_g = values("loss_d", printed), values("loss_g", printed)
    assert len(loss_d) == len(loss_g) == 40
    assert loss_d[0] == pytest.approx(2 * 0.693, abs=0.15)  # 2 ln 2: real and generated look alike
    assert loss_d[-1] < loss_d[0] - 0.2
    assert values("p(real)", printed)[-1] > values("p(fake)", printed)[-1] + 0.1


def test_gpt_resumes_as_if_never_interrupted(tmp_path: Path) -> None:
    options = f"{SMALL_GPT} --dropout 0.1 --accumulate 2 --decay-steps 12"
    saved = tmp_path / "gpt.pt"
    with ThreadPoolExecutor(max_workers=2) as pool:
        uninterrupted = pool.submit(lines, "gpt.py", f"{options} --steps 12")
        first = lines("gpt.py", f"{options} --steps 7 --checkpoint {saved}")
    second = lines("gpt.py", f"{options} --steps 12 --resume {saved}")
    whole = uninterrupted.result()
    assert first[:8] == whole[:8]  # a line on the model and seven steps, then the first part's validation
    assert second[1:] == whole[8:]
    assert len(values("  loss", second)) == 5


def test_gpt_runs_as_a_module() -> None:
    done = start("-m", "halfstep.workloads.gpt", *SMALL_GPT.split(), "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert len(values("validation loss", done.stdout.splitlines())) == 1


def test_gpt_accumulates_the_mean_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    """Two halves of a batch give the loss and gradient norm of the whole, for they draw the same text."""
    gpt.main(f"{SMALL_GPT} --steps 1 --batch 8".split())
    whole = capsys.readouterr().out.splitlines()
    gpt.main(f"{SMALL_GPT} --steps 1 --batch 4 --accumulate 2".split())
    halves = capsys.readouterr().out.splitlines()
    for name in ("  loss", "norm"):
        assert values(name, halves) == pytest.approx(values(name, whole), rel=1e-3)
        assert len(values(name, whole)) == 1


def test_tied_gpt_has_one_matrix_less() -> None:
    untied = gpt.GPT(gpt.parse_args(SMALL_GPT.split()))
    tied = gpt.GPT(gpt.parse_args([*SMALL_GPT.split(), "--tie"]))
    assert tied.head.weight is tied.tokens.weight
    sizes = [sum(p.numel() for p in model.parameters()) for model in (untied, tied)]
    assert sizes[0] - sizes[1] == 256 * 32


def test_default_gpt_has_about_ten_million_parameters() -> None:
    with torch.device("meta"):
        model = gpt.GPT(gpt.parse_args([]))
    assert 9e6 < sum(p.numel() for p in model.parameters()) < 12e6


def test_gpt_is_causal() -> None:
    """A changed byte changes the logits from its place on, and none before."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.parse_args(SMALL_GPT.split()))
    ids = torch.randint(256, (1, 32))
    other = ids.clone()
    other[0, 20] = (other[0, 20] + 1) % 256
    changed = (model(ids) != model(other)).any(dim=-1)[0]
    assert changed.tolist() == [False] * 20 + [True] * 12


def test_gpt_schedule_warms_up_and_decays() -> None:
    args = gpt.parse_args([*SMALL_GPT.split(), "--steps", "25", "--warmup", "5", "--lr", "1"])
    optimizer, scheduler = gpt.build_optimizer(gpt.GPT(args), args)
    rates = []
    for _ in range(26):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[15] == pytest.approx(0.55)  # half-way down the cosine
    assert rates[25] == pytest.approx(0.1)


def test_gpt_held_out_text_is_not_trained_on() -> None:
    train, held_out = gpt.load_text()
    assert len(held_out) / (len(train) + len(held_out)) == pytest.approx(0.1, abs=1e-5)
    assert bytes(held_out[:2000].tolist()) not in bytes(train.tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "30", "--heads", "4"], "--width 30 is not a multiple of --heads 4"),
        (["--steps", "0"], "argument --steps: must be at least 1, not 0"),
        (["--checkpoint", "missing_folder/gpt.pt"], "there is no folder missing_folder"),
    ],
)
def test_gpt_names_a_bad_argument(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        gpt.parse_args(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_scikit_learn_is_one_clear_line() -> None:
    # None in sys.modules makes the import fail as it does where the package is not installed.
    program = "import runpy, sys; sys.modules['sklearn'] = None; runpy.run_path({!r}, run_name='__main__')"
    scripts = [str(FOLDER / script) for script in SCRIPTS if script != "gpt.py"]
    with ThreadPoolExecutor(max_workers=2) as pool:
        for done in pool.map(lambda path: start("-c", program.format(path)), scripts):
            assert done.returncode == 1
            assert done.stderr == "this script needs scikit-learn: pip install scikit-learn\n"
