"""The verbs. Each imports its command when it is called, so that `--help` is fast and `predict` needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(
    name="fewmask",
    help="Turn a folder of images and a handful of masks into a small, fast, measured segmentation model.\n\n"
    "Begin with `fewmask demo`, then `fewmask run MY_FOLDER --out RUN`, where MY_FOLDER holds images/ and masks/ with "
    "files of the same names. Research use only: not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Data = Annotated[Path, typer.Argument(help="Folder with images/ and masks/ (same file names), or with a manifest.csv.")]
Manifest = Annotated[
    Optional[str],  # noqa: UP045 - Typer reads the annotation at run time
    typer.Option(help="A CSV inside DATA with the columns image,mask,split,group,label."),
]
Unlabelled = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option(help="A folder of images without masks to learn from; repeat it for more."),
]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings such as run.time=15m, run.seed=1, finetune.epochs=30; a key that there is not is answered with "
        "those there are.",
    ),
]
PretrainRecipe = Annotated[
    str,
    typer.Argument(help="A TOML file, or one that is shipped: dino, figure, g2ll, mae, simmim, supervised, tedmae."),
]
FinetuneRecipe = Annotated[str, typer.Argument(help="A TOML file, or one that is shipped: transunet, unet.")]
SelectRecipe = Annotated[str, typer.Argument(help="A TOML file, or the one that is shipped: two_stage.")]
DistillRecipe = Annotated[str, typer.Argument(help="A TOML file, or one that is shipped: mobile_unet, tiny_unet.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]
OutRun = Annotated[Path, typer.Option("--out", help="The run's folder; the same command again resumes there.")]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder.")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Turn a folder of images and a handful of masks into a small, fast, measured segmentation model.

    Begin with `fewmask demo`, then `fewmask run MY_FOLDER --out RUN`, where MY_FOLDER holds images/ and masks/ with
    files of the same names. Research use only: not a medical device.
    """
    if version:
        from fewmask import __version__

        typer.echo(f"fewmask {__version__}")
        raise typer.Exit


@app.command()
def demo(out: OutRun = Path("demo"), settings: Settings = None) -> None:
    """Watch the whole chain on images that fewmask draws itself: minutes on two cores, ends with a report."""
    from fewmask.commands.demo import demo as command

    raise typer.Exit(command(out, settings or []))


@app.command()
def run(
    data: Data,
    out: OutRun,
    settings: Settings = None,
    manifest: Manifest = None,
    unlabelled: Unlabelled = None,
    recipe: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped recipe.")] = "run",
    as_json: Json = False,
) -> None:
    """Do the whole chain on your folder: check, pretrain, finetune, evaluate, export, report.

    Leaves model.onnx, report.html and metrics.json in the run's folder. Stop it at any time; the same command resumes.
    """
    from fewmask.commands.chain import run as command

    raise typer.Exit(command(data, out, manifest, unlabelled or [], settings or [], recipe, as_json))


@app.command()
def check(
    data: Data,
    manifest: Manifest = None,
    unlabelled: Unlabelled = None,
    source: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="DATA is a public set as downloaded: isic2016 ... siim_acr. Import it into --out first."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="Where --source writes the imported set.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Say what is wrong with the data before an hour is spent on it; exit code 1 when something must be mended."""
    from fewmask.commands.check import check as command

    raise typer.Exit(command(data, manifest, unlabelled or [], as_json, source, out))


@app.command()
def pretrain(recipe: PretrainRecipe, settings: Settings = None) -> None:
    """Train an encoder on images without masks: fewmask pretrain mae data.root=MY_FOLDER run.out=RUN.

    Method figure trains a whole segmenter: on pictures of one thing about the middle, such as lesions.
    """
    from fewmask.commands.verbs import stage

    raise typer.Exit(stage("pretrain", recipe, settings or []))


@app.command()
def finetune(recipe: FinetuneRecipe, settings: Settings = None) -> None:
    """Train a segmenter on the few masks: fewmask finetune unet data.root=MY_FOLDER run.out=RUN.

    The encoder starts from model.weights: none, packaged, imagenet, or a run's folder, of which its pre-training is
    taken where it has one; where that left a whole segmenter of the same kind, the decoder starts from there too. To
    go on from a fine-tuned segmenter, give RUN/finetune/model.safetensors.
    """
    from fewmask.commands.verbs import stage

    raise typer.Exit(stage("finetune", recipe, settings or []))


@app.command()
def select(recipe: SelectRecipe, settings: Settings = None, as_json: Json = False) -> None:
    """Try auxiliary tasks, before and beside fine-tuning, and keep the better way of each by validation Dice.

    fewmask select two_stage data.root=MY_FOLDER run.out=TASKS; then learn from all of them: fewmask distill ...
    distill.teachers='["TASKS"]'. Stop it at any time; the same command resumes.
    """
    from fewmask.commands.select import select as command

    raise typer.Exit(command(recipe, settings or [], as_json))


@app.command()
def distill(recipe: DistillRecipe, settings: Settings = None) -> None:
    """Train a small student from a large teacher: fewmask distill tiny_unet data.root=MY_FOLDER run.out=SMALL
    distill.teachers='["RUN"]'.

    Images without a mask help too: there the student learns from what the teacher says. The student is what [student]
    describes; two or more teachers are an ensemble.
    """
    from fewmask.commands.verbs import stage

    raise typer.Exit(stage("distill", recipe, settings or []))


@app.command()
def evaluate(
    run: RunFolder,
    data: Data,
    split: Annotated[
        str, typer.Option(help="train, val, test or all; all is for data the run has never seen.")
    ] = "test",
    manifest: Manifest = None,
    against: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Another run scored on the same images: print the paired difference."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a run's segmenter: Dice, IoU, HD95 with intervals, into metrics.json and a CSV of cases."""
    from fewmask.commands.evaluate import evaluate as command

    raise typer.Exit(command(run, data, split, manifest, against, as_json))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="One run's folder, or several to set side by side.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page: results with intervals, curves, best and worst cases, how it was made."""
    from fewmask.commands.report import report as command

    raise typer.Exit(command(runs, out))


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Optional[Path], typer.Option(help="The ONNX file; RUN/model.onnx when left out.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Write the model as one ONNX file that takes any photo and gives a mask, checked against torch first."""
    from fewmask.commands.export import export as command

    raise typer.Exit(command(run, out, as_json))


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="An exported .onnx file (torch is not needed) or a run's folder.")],
    paths: Annotated[list[str], typer.Argument(help="Photos, folders of photos, or patterns such as 'photos/*.jpg'.")],
    out: Annotated[Path, typer.Option(help="Folder for the masks and areas.csv.")] = Path("predictions"),
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write each photo with the contour drawn on it.")
    ] = False,
    threshold: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Probability from which a pixel counts as inside; the model's own when left out."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Segment photos: masks as PNG at the photo's own size, and areas as CSV."""
    from fewmask.commands.predict import predict as command

    raise typer.Exit(command(model, paths, out, overlay, threshold, as_json))


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="An exported .onnx file or a run's folder.")],
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
) -> None:
    """Open a page where a photo can be dropped, on this machine only."""
    from fewmask.commands.serve import serve as command

    raise typer.Exit(command(model, port, host))


@app.command()
def reproduce(
    table: Annotated[str, typer.Argument(help="g2ll-table1, g2ll-table2, tedmae, boundary-distillation or two-stage.")],
    data: Annotated[
        Path,
        typer.Option(help="Folder whose manifest gives every mask its split; two-stage also takes grid.folds=5."),
    ],
    settings: Settings = None,
    manifest: Manifest = None,
    budget: Annotated[
        str,
        typer.Option(
            help="smoke (seconds), cpu (hours on two cores), gpu (untried: an hour or so) or full (the paper's)."
        ),
    ] = "cpu",
    unlabelled: Unlabelled = None,
    unseen: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Another data set with masks, to score every segmenter on."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Where the runs and table.md go (runs/TABLE-BUDGET); the same command resumes there."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a table of a paper on your data: grid.seeds=3, grid.rows='["mae", "g2ll"]', grid.fractions='[0.1, 1.0]'.

    In boundary-distillation, grid.student names the student's recipe (tiny_unet, mobile_unet or a file), model.* the
    teacher that each cell trains, and grid.teachers='["RUN"]' a teacher of your own instead ("RUNS/{fraction}-{seed}":
    one for each cell); grid.predict_once=true asks it before the training, once, and not at every step.

    Leaves table.json, table.md and table.svg beside the runs, written anew after each. Stop it at any time. Start the
    same command several times, each with run.threads=1, and the processes share the work.
    """
    from fewmask.commands.reproduce import reproduce as command

    raise typer.Exit(command(table, data, manifest, budget, unlabelled or [], unseen, out, settings or [], as_json))
