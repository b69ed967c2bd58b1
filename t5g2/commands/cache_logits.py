"""`t5g2 cache-logits`."""

from t5g2.commands.flags import CONFIG, SHARDS, SHARDS_OUT, SOURCES, Flag, Parsed

FLAGS = {
    "config": CONFIG,
    "teacher": Flag(
        None,
        "model with the run's tokenizer, in any format that import reads; decoder-only where objectives are stochastic",
        required=True,
    ),
    "out": SHARDS_OUT,
    "method": Flag("top_k", "top_k stores the likeliest tokens of each distribution; sampled draws the tokens"),
    "per_token": Flag(256, "number of tokens stored of each distribution", least=1),
    "sources": SOURCES,
    "shards": SHARDS,
    "part": Flag("0/1", "INDEX/COUNT: 0/4, 1/4, 2/4 and 3/4 split the shards between four calls"),
}


def run(flags: Parsed) -> None:
    """Computes a teacher's logits for a config's sources ahead of a run, and stores a part of them.

    Example: t5g2 cache-logits --config=my_config.py --teacher=models/gemma-3-270m --out=logits --per_token=8 --shards=2
    """
    from t5g2.jobs import teacher_cache
    from t5g2.models.distillation import Distillation
    from t5g2.train import config_file

    teacher_cache.cache_teacher_logits(
        config_file.load(flags.config, flags.overrides),
        flags.teacher,
        flags.out,
        Distillation(method=flags.method, per_token=flags.per_token),
        names=flags.names("sources"),
        shards=flags.shards,
        part=teacher_cache.WorkShare.parse(flags.part),
    )
