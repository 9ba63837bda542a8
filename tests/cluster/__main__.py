"""Command line of the test cluster: `python -m cluster build | up | down | env | status`."""

import argparse
import sys
from pathlib import Path

from cluster.build import build_everything
from cluster.errors import ClusterFailedError, ClusterUnavailableError
from cluster.lifecycle import bring_down, bring_up, describe_environment, describe_status
from cluster.places import default_state_dir


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    parser.add_argument("--state", type=Path, default=default_state_dir(), help="state folder (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster, or what is missing of a running one")
    up.add_argument(
        "--control-plane-only", action="store_true", help="API server and controllers on loopback, no root needed"
    )
    up.add_argument(
        "--images",
        choices=("none", "operator", "all"),
        default="all",
        help="which of our images to build and load (default: %(default)s)",
    )
    up.add_argument("--own", action="store_true", help="never use kind, even where a container engine answers")
    build = commands.add_parser("build", help="build programs and images, and start nothing")
    build.add_argument("--own", action="store_true", help="what our own node needs, even where kind would be used")
    commands.add_parser("down", help="stop what `up` started and remove all it made")
    commands.add_parser("env", help='print shell exports: eval "$(python -m cluster env)"')
    commands.add_parser("status", help="say what runs; exit 1 if a part has died or none is there")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed or not running, 3 this machine cannot run it (the message says what would help)."""
    options = build_parser().parse_args(arguments)
    folder = options.state.resolve()
    try:
        if options.command == "build":
            return build_everything(own=options.own)
        if options.command == "up":
            bring_up(folder, control_plane_only=options.control_plane_only, images=options.images, own=options.own)
            print(describe_status(folder)[0])
        elif options.command == "down":
            bring_down(folder)
        elif options.command == "env":
            print(describe_environment(folder))
        else:
            text, healthy = describe_status(folder)
            print(text)
            return 0 if healthy else 1
    except ClusterUnavailableError as error:
        print(f"cluster: not possible here: {error}", file=sys.stderr)
        return 3
    except ClusterFailedError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
