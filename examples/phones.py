"""Made-up ratings of apps by phone users, from a public seed: the table of `examples/phones.toml`.

Each user has a taste of three numbers, and so has each app; a rating is how they meet, plus a habit of the user and a
fame of the app, plus chance.

    python examples/phones.py ratings.csv
"""

import sys
from pathlib import Path

import numpy as np

USERS, APPS, EACH, TASTES = 120, 60, 40, 3


def main() -> None:
    randomness = np.random.default_rng(2026)
    users, apps = randomness.normal(size=(USERS, TASTES)), randomness.normal(size=(APPS, TASTES))
    habit, fame = 0.5 * randomness.normal(size=USERS), 0.4 * randomness.normal(size=APPS)
    lines = ["user,app,rating"]
    for user in range(USERS):
        for app in sorted(randomness.choice(APPS, EACH, replace=False).tolist()):
            liking = 0.6 * users[user] @ apps[app] + habit[user] + fame[app] + 0.4 * randomness.normal()
            lines.append(f"user-{user + 1:03},{app + 1},{int(np.clip(np.round(3 + liking), 1, 5))}")
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main()
