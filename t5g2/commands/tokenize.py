"""`t5g2 tokenize`."""

from t5g2.commands.flags import CONFIG, SHARDS, SHARDS_OUT, SOURCES, Flag, Parsed

FLAGS = {
    "config": CONFIG,
    "out": SHARDS_OUT,
    "sources": SOURCES,
    "shards": SHARDS,
    "workers": Flag(1, "processes that write shards", least=1, most=1024),
    "beam": Flag(
        None, "options of an Apache Beam pipeline that writes them instead, such as --beam='--runner=DirectRunner'"
    ),
}


def run(flags: Parsed) -> None:
    """Tokenises a config's sources ahead of a run, into shards that a run opens without reading the text.

    Example: t5g2 tokenize --config=my_config.py --out=tokens --shards=64 --workers=16
    """
    from t5g2.data.shards import beam
    from t5g2.jobs.source_tokens import tokenize_sources
    from t5g2.train import config_file

    tokenize_sources(
        config_file.load(flags.config, flags.overrides).data,
        flags.out,
        names=flags.names("sources"),
        shards=flags.shards,
        workers=flags.workers,
        runner=beam.pipeline(flags.beam) if flags.beam else None,
    )
