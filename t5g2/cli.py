"""The `t5g2` command: each subcommand parses its flags and calls one function.

Exit status: 0 done; 2 the input is wrong (do not retry); 1 anything else (may be retried); 143 after SIGTERM and 130
after Ctrl-C, with the checkpoint saved.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from t5g2.core import device, distributed
from t5g2.core.errors import ENVIRONMENT, UserError, unknown


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a subcommand.

    Attributes:
      default: its value where it is not given.
      required: it must be given.
      kind: int, float, bool or str; that of the default unless it is said.
      least: no number below it is taken.
    """

    default: Any
    help: str
    required: bool = False
    kind: type | None = None
    least: float | None = None

    @property
    def shown(self) -> str:
        """What stands behind the name in the help."""
        return "  (required)" if self.required else "" if self.default is None else f"={self.default}"


CONFIG = Flag(
    None, "FILE[:ARG], the config file and what its get_config is called with; --config.a.b=VALUE changes a key", True
)
WORKDIR = Flag(None, "folder of the run: checkpoints, metrics, samples, report", True)
MODEL = Flag(None, "model folder, or a Hugging Face or an official Flax one", True)
DTYPE = Flag(None, "float32, bfloat16 or float16, to cast weights to; as they are stored unless given")
OUT = Flag(None, "folder to write; it must not exist", True)
ALLOW_CHANGE = Flag("", "settings, separated by commas, that may differ from the saved experiment")
DISTRIBUTED = Flag("auto", "join the other processes of a pod: auto (where a cluster is found), on, off")


def train(argv: list[str]) -> None:
    """Trains the experiment of a config file; run again, the same command resumes.

    Example: t5g2 train --config=configs/quickstart.py:source --workdir=runs/source --config.train.steps=50
    """
    given, overrides = parse(
        train,
        argv,
        config=CONFIG,
        workdir=WORKDIR,
        distributed=DISTRIBUTED,
        replay=Flag(
            None, "begin at this step's checkpoint instead of the newest, and write nothing", kind=int, least=0
        ),
        allow_change=ALLOW_CHANGE,
    )
    from t5g2.train import experiment, loop

    device.cache_compilations()
    distributed.initialize(given.distributed)
    loop.train(
        experiment.load(given.config, overrides),
        given.workdir,
        replay=given.replay,
        allow_change=_listed(given.allow_change),
    )


def evaluate(argv: list[str]) -> None:
    """Scores a checkpoint of a run on the tasks of its config; writes scores.json and predictions.jsonl.

    Example: t5g2 evaluate --config=configs/quickstart.py:adapted --workdir=runs/adapted --step=last
    """
    step = Flag("last", "step of the checkpoint, or last")
    tasks = Flag("", "names of tasks, separated by commas; all of the config's unless given")
    given, overrides = parse(
        evaluate,
        argv,
        config=CONFIG,
        workdir=WORKDIR,
        step=step,
        tasks=tasks,
        distributed=DISTRIBUTED,
        allow_change=ALLOW_CHANGE,
    )
    from t5g2.commands import evaluate
    from t5g2.train import experiment

    device.cache_compilations()
    distributed.initialize(given.distributed)
    evaluate.evaluate_run(
        experiment.load(given.config, overrides),
        given.workdir,
        step=given.step,
        tasks=_listed(given.tasks),
        allow_change=_listed(given.allow_change),
    )


def generate(argv: list[str]) -> None:
    """Completes a prompt, or every line of a jsonl file ({"prompt": …}), with a model.

    Example: t5g2 generate --model=models/t5gemma2-4b --prompt="What is this?" --image=photo.jpg --max_new_tokens=40
    """
    given, _ = parse(
        generate,
        argv,
        model=MODEL,
        prompt=Flag(None, "text to complete"),
        crops=Flag(0, "crops at most that follow each long image (pan-and-scan)", least=0),
        image=Flag("", "image files for the prompt, separated by commas; they stand where it says <start_of_image>"),
        input=Flag(None, "jsonl file of prompts, instead of --prompt"),
        out=Flag(None, "jsonl file to write, with --input; it must not exist"),
        max_new_tokens=Flag(64, "tokens to generate at most", least=1),
        temperature=Flag(0.0, "0 = the likeliest token; above, sampling", least=0),
        seed=Flag(0, "seed of the sampling"),
    )
    import t5g2
    from t5g2.commands import generate

    prompts = generate.prompts(given.prompt, given.input, given.out)
    images = _listed(given.image)
    if images and given.prompt is None:
        raise UserError("--image is for the prompt of --prompt; give both, or neither")
    sampler = t5g2.Greedy() if given.temperature == 0 else t5g2.Temperature(given.temperature)
    options = {"max_new_tokens": given.max_new_tokens, "sampler": sampler, "seed": given.seed, "crops": given.crops}
    outputs = t5g2.load(given.model).generate(prompts, [images] if images else None, **options)
    generate.tell(prompts, outputs, given.out)


def import_(argv: list[str]) -> None:
    """Makes a model folder of a Hugging Face folder (config.json, safetensors) or an official Flax one (Orbax).

    Example: t5g2 import --source=downloads/t5gemma-2-270m-270m --out=models/t5gemma2-270m --verify
    """
    config = Flag(None, "architecture, where the folder does not say: a size such as gemma3:1b, or a model.json")
    verify = Flag(False, "compare the result with transformers, in float32; needs transformers and torch")
    source = Flag(None, "Hugging Face folder or official Flax folder", True)
    size = Flag(None, "of images in pixels, if not what the tower was trained with; 896 or 448", kind=int, least=1)
    flags = {"source": source, "out": OUT, "config": config, "verify": verify, "dtype": DTYPE, "image_size": size}
    given, changes = parse(import_, argv, **flags)
    if changes:
        raise UserError(f"--config.{changes[0][0]} cannot be changed here; write a model.json and give --config=FILE")
    from t5g2.commands import verify as verification

    how = {"config": given.config, "dtype": given.dtype, "image_size": given.image_size}
    verification.import_model(given.source, given.out, verify=given.verify, **how)


def export(argv: list[str]) -> None:
    """Writes a model folder as a Hugging Face folder, which transformers loads.

    Example: t5g2 export --model=runs/adapted/model --out=models/adapted-hf
    """
    given, _ = parse(export, argv, model=MODEL, out=OUT, dtype=DTYPE)
    from t5g2.checkpoint import export_folder

    deviations = export_folder.export_model(given.model, given.out, dtype=given.dtype)
    print(f"wrote {given.out}")
    for deviation in deviations:
        print(f"transformers computes it otherwise for {deviation}")


def adapt(argv: list[str]) -> None:
    """Turns a decoder-only model into an encoder-decoder one and prints where every weight comes from.

    Example: t5g2 adapt --source=models/gemma-2-9b,models/gemma-2-2b --target=t5gemma:9b-2b --out=models/adapted
    """
    given, changes = parse(
        adapt,
        argv,
        source=Flag(
            None, "decoder-only model folder, Hugging Face or official Flax one; or two: ENCODER,DECODER", True
        ),
        target=Flag(None, "t5gemma or t5gemma2 (the source's sizes), a size, a model.json; --target.a.b=VALUE", True),
        out=OUT,
        vision=Flag(None, "folder whose image tower is taken, with a new projector"),
        encoder_layers=Flag("all", "layers of the source to take: all, first:N, last:N, every:K, or 0,2,5"),
        decoder_layers=Flag("all", "likewise for the decoder"),
        cross_attention=Flag("auto", "separate cross-attention: self (copied), fresh, auto (self if widths are equal)"),
        cross_norms=Flag("self", "its norms: self (copied), fresh (factor 1), none (nothing is added at first)"),
        vocabulary=Flag("same", "rows of the embedding: same, or resize to the target's"),
        dtype=DTYPE,
        seed=Flag(0, "seed of the weights that no source has"),
    )
    from t5g2.train import adaptation

    adaptation.adapt_folder(
        adaptation.from_flags(given.source, given.vision, {name: given[name].value for name in adaptation.CHOICES}),
        given.target,
        given.out,
        changes=changes,
        dtype=given.dtype,
        seed=given.seed,
    )


def average(argv: list[str]) -> None:
    """Writes the mean, in float32, of the last checkpoints of a run as a model folder.

    Example: t5g2 average --workdir=runs/adapted --last=5 --out=models/averaged
    """
    last = Flag(5, "number of checkpoints, counted back from the newest", least=1)
    given, _ = parse(average, argv, workdir=WORKDIR, last=last, out=OUT)
    from t5g2.train import adaptation

    adaptation.average_run(given.workdir, given.out, last=given.last)


def check(argv: list[str]) -> None:
    """A dry run: shapes, shardings, memory per device, FLOPs and one batch; no weight is made.

    Example: t5g2 check --config=configs/quickstart.py:adapted --devices=8 --hbm_gib=16
    """
    devices = Flag(0, "simulated devices to shard over; 0 = those of this machine", least=0)
    hbm_gib = Flag(0.0, "memory of one device in GiB; more than it holds is an error (0 = do not ask)", least=0)
    given, overrides = parse(check, argv, config=CONFIG, devices=devices, hbm_gib=hbm_gib)
    from t5g2.commands import check as dry_run
    from t5g2.train import experiment

    dry_run.check(experiment.load(given.config, overrides), devices=given.devices, hbm_gib=given.hbm_gib)


def data(argv: list[str]) -> None:
    """Shows the first rows of a config's data as a person reads them, the shares of its denoisers, and its padding.

    Example: t5g2 data --config=configs/quickstart.py:adapted --n=3 --page=data.html
    """
    rows = Flag(3, "rows to show", least=0)
    page = Flag(None, "HTML file to write: the rows in colours, and who sees whom in them")
    given, overrides = parse(data, argv, config=CONFIG, n=rows, page=page)
    from t5g2.commands import data as preview
    from t5g2.train import experiment

    made = experiment.load(given.config, overrides)
    seen = preview.look(made)
    preview.show(seen, rows=given.n)
    if given.page is not None:
        from t5g2.report import data_page

        data_page.write(made, seen, given.page, rows=given.n)


def tokenize(argv: list[str]) -> None:
    """Makes tokens of a config's sources ahead of a run, as shards that it opens without reading a text.

    Example: t5g2 tokenize --config=configs/t5gemma2.py:4b-4b --out=tokens --shards=64 --workers=16
    """
    given, overrides = parse(
        tokenize,
        argv,
        config=CONFIG,
        out=Flag(None, "folder to write, a folder in it for each source; interrupted, the same command goes on", True),
        sources=Flag("", "names of sources, separated by commas; all of the config's unless given"),
        shards=Flag(16, "files that each source is written to", least=1),
        workers=Flag(1, "processes that make shards", least=1),
        beam=Flag(None, "options of an Apache Beam pipeline that makes them, such as --beam='--runner=DirectRunner'"),
    )
    from t5g2.commands import data as preview
    from t5g2.data.shards import beam
    from t5g2.train import experiment

    data = experiment.load(given.config, overrides).data
    how = {"shards": given.shards, "workers": given.workers, "run": beam.pipeline(given.beam) if given.beam else None}
    preview.tokenize(data, given.out, names=_listed(given.sources), **how)


def cache_logits(argv: list[str]) -> None:
    """Asks a teacher about every chunk of a config's sources ahead of a run, and keeps what it says of each token.

    Example: t5g2 cache-logits --config=configs/t5gemma2.py:1b-1b --teacher=models/gemma3-4b --out=answers
    """
    given, overrides = parse(
        cache_logits,
        argv,
        config=CONFIG,
        teacher=Flag(None, "folder of a model with the run's tokenizer, decoder-only for objectives that draw", True),
        out=Flag(None, "folder to write, a folder in it for each source; interrupted, the same command goes on", True),
        method=Flag("top_k", "top_k keeps the likeliest tokens of each distribution; sampled draws them"),
        per_token=Flag(256, "how many tokens of each distribution are kept", least=1),
        sources=Flag("", "names of sources, separated by commas; all of the config's unless given"),
        shards=Flag(16, "files that each source is written to", least=1),
        part=Flag("0/1", "0/4, 1/4, 2/4 and 3/4 in four calls share the shards out"),
    )
    from t5g2.commands import cache_logits
    from t5g2.models.distillation import Distillation
    from t5g2.train import experiment

    device.cache_compilations()
    cache_logits.cache_answers(
        experiment.load(given.config, overrides),
        given.teacher,
        given.out,
        Distillation(method=given.method, per_token=given.per_token),
        names=_listed(given.sources),
        shards=given.shards,
        part=cache_logits.Part.parse(given.part),
    )


def sweep(argv: list[str]) -> None:
    """Runs every variant of a sweep file, skips what is done, resumes what is not, and writes the report.

    Example: t5g2 sweep --sweep=experiments/quickstart.py --workdir=runs/quickstart
    """
    launcher = Flag("local", "local runs the commands here, one after the other; print only shows them")
    given, _ = parse(sweep, argv, sweep=Flag(None, "file with get_sweep()", True), workdir=WORKDIR, launcher=launcher)
    from t5g2 import sweep as sweeps

    sweeps.run(given.sweep, given.workdir, launcher=given.launcher)


def report(argv: list[str]) -> None:
    """Writes report/index.html, metrics.csv and table.md of a run or a sweep, and prints the table.

    Example: t5g2 report --workdir=runs/quickstart
    """
    given, _ = parse(report, argv, workdir=WORKDIR)
    from t5g2.report import contents as reports

    reports.write(given.workdir)


def name_of(command: Callable) -> str:
    """The name of a subcommand: that of its function, where a _ at the end keeps it from being a word of Python's."""
    return command.__name__.rstrip("_").replace("_", "-")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    name_of(f): f
    for f in (
        train,
        evaluate,
        generate,
        import_,
        export,
        adapt,
        average,
        check,
        data,
        tokenize,
        cache_logits,
        sweep,
        report,
    )
}


class HelpAsked(Exception):
    """--help was among the flags; the text is the argument."""


def parse(command: Callable, argv: list[str], **declared: Flag) -> tuple[Any, list[tuple[str, str]]]:
    """(the flags as attributes, [(dotted path, text)] of --config.a.b=VALUE) of a subcommand; or of --target.a.b=VALUE.

    Raises:
      UserError: an unknown flag (with the nearest one), a value of the wrong type, a required flag that is missing.
    """
    if {"--help", "-h"} & set(argv):
        lines = [f"  --{name}{flag.shown}\n      {flag.help}" for name, flag in declared.items()]
        raise HelpAsked(f"t5g2 {name_of(command)}\n\n{inspect.getdoc(command)}\n\nFlags:\n" + "\n".join(lines))
    values = flags.FlagValues()
    define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    for name, flag in declared.items():
        define.get(flag.kind or type(flag.default), flags.DEFINE_string)(
            name, flag.default, flag.help, flag_values=values
        )
    whole = next((name for name in ("config", "target") if name in declared), "-")  # what has parts that can be set
    changes = [a for a in argv if a.lstrip("-").startswith(f"{whole}.")]
    parts = [a.lstrip("-").removeprefix(f"{whole}.").partition("=") for a in changes]
    for path, equals, _ in parts:
        if not equals:
            raise UserError(f"--{whole}.{path} has no value; write --{whole}.{path}=VALUE")
    try:
        rest = values(["t5g2", *(a for a in argv if a not in changes)])[1:]
    except flags.UnrecognizedFlagError as error:
        raise unknown(f"flag of t5g2 {name_of(command)}", error.flagname, declared) from None
    except flags.Error as error:
        raise UserError(f"{error}; see t5g2 {name_of(command)} --help") from None
    if rest:
        raise UserError(f"{rest[0]!r} is no flag; flags are written --name=VALUE, see t5g2 {name_of(command)} --help")
    for name, flag in declared.items():
        if flag.required and values[name].value in (None, ""):
            raise UserError(f"--{name} is missing: {flag.help}")
        value = values[name].value
        if flag.least is not None and value is not None and not value >= flag.least:  # NaN is not either
            raise UserError(f"--{name}={value}; it must be at least {flag.least}: {flag.help}")
    return values, [(path, text) for path, _, text in parts]


def _listed(text: str) -> tuple[str, ...]:
    """The names that commas separate."""
    return tuple(filter(None, text.split(",")))


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("--help", "-h", "help"):
        first = [f"  t5g2 {name:12} {(f.__doc__ or '').splitlines()[0]}" for name, f in COMMANDS.items()]
        print(
            "t5g2: decoder-only in, encoder-decoder out\n\n"
            + "\n".join(first)
            + "\n\nt5g2 COMMAND --help shows its flags and an example."
        )
        return 0
    if argv[0] == "--version":
        from t5g2 import __version__

        print(__version__)
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise unknown("command", argv[0], COMMANDS)
        COMMANDS[argv[0]](argv[1:])
    except HelpAsked as help_text:
        print(help_text)
    except UserError as error:
        print(f"t5g2 {argv[0]}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in ENVIRONMENT:
            raise
        print(f"t5g2 {argv[0]}: {error}; {ENVIRONMENT[error.errno]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
