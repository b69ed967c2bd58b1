"""Time of `import t5g2` and `t5g2 --help`, as ratios to `import jax`: fresh processes, in turn, the best of each.

Must: `import t5g2` at most 1.5 times `import jax`.
"""

import subprocess
import sys
import time

PROGRAMS = {
    "python": "pass",
    "import jax": "import jax",
    "import t5g2": "import t5g2",
    "t5g2 --help": "from t5g2.cli import main; main(['--help'])",
    "import t5g2.train.loop": "import t5g2.train.loop",
}


def main():
    best = dict.fromkeys(PROGRAMS, float("inf"))
    for _ in range(5):
        for name, code in PROGRAMS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            best[name] = min(best[name], time.perf_counter() - start)
    print("| program | times `import jax` |\n|---|---|")
    for name, seconds in best.items():
        print(f"| {name} | {seconds / best['import jax']:.2f} |")


if __name__ == "__main__":
    main()
