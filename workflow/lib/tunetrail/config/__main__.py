"""python -m tunetrail.config check|resolve|schema|document"""

import json
import sys
from pathlib import Path

import yaml

from tunetrail.config.documentation import KEYS_END, KEYS_START, document, schema
from tunetrail.config.loading import load
from tunetrail.errors import ConfigError


def main(argv: list[str]) -> int:
    match argv:
        case ["schema"]:
            print(json.dumps(schema(), indent=2, sort_keys=True))
        case ["document"]:
            print(document(), end="")
        case ["document", "--write", path]:
            readme = Path(path)
            head, _, rest = readme.read_text(encoding="utf-8").partition(KEYS_START)
            readme.write_text(
                f"{head}{KEYS_START}\n{document()}{KEYS_END}{rest.partition(KEYS_END)[2]}", encoding="utf-8"
            )
        case ["check" | "resolve" as command, path]:
            try:
                config = load(Path(path))
            except ConfigError as e:
                print(e, file=sys.stderr)
                return e.exit_code
            if command == "resolve":
                print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
