"""A `flwr` without a SuperLink, for the tests of `fedface server`: nodes and runs are in a file of FLWR_HOME.

It takes the options that fedface uses and answers with Flower 1.42's JSON, errors included: these end with exit code 0.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

STATE = Path(os.environ["FLWR_HOME"]) / "fake.json"
NOW = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def ending() -> dict[str, str]:
    """How a run ends, when its log is read: as FLWR_HOME/ending.json says, or completed."""
    file = STATE.with_name("ending.json")
    done = {"status": "finished:completed", "status-details": "N/A"}
    return json.loads(file.read_text()) if file.exists() else done


def main(words: list[str]) -> dict[str, object]:
    """Answer one command, or raise ValueError with the reason."""
    state = json.loads(STATE.read_text()) if STATE.exists() else {"nodes": [], "keys": [], "runs": []}
    if words[0] == "log":
        assert words[2:] == ["fedface", "--stream"], words
        print(
            "INFO : Start `flwr-serverapp` process\nfedface: round 1 of 2\nfedface: round 2 of 2\nTraceback"
        )
        (run,) = (run for run in state["runs"] if run["run-id"] == words[1])
        run.update(ending())
        STATE.write_text(json.dumps(state))
        sys.exit()
    assert words[-3:] == ["fedface", "--format", "json"], words
    assert (STATE.parent / "config.toml").exists() and os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    answer: dict[str, object] = {"success": True}
    match words[:-3]:
        case ["supernode", "list"]:
            answer["nodes"] = state["nodes"]
        case ["supernode", "register", file]:
            if (key := Path(file).read_text()) in state["keys"]:
                raise ValueError("[code: 23] Public key already in use.")
            node = 2**63 + len(state["nodes"])
            state["keys"].append(key)
            times = {"created-at": NOW, "online-at": "N/A", "offline-at": "N/A", "deleted-at": "N/A"}
            state["nodes"].append({"node-id": str(node), "status": "registered", **times})
            answer["node-id"] = node
        case ["supernode", "unregister", number]:
            (node,) = (node for node in state["nodes"] if node["node-id"] == number)
            node.update({"status": "unregistered", "deleted-at": NOW})
        case ["run", app]:
            project = tomllib.loads((Path(app) / "pyproject.toml").read_text())
            answer["run-id"] = str(2**63 + 100 + len(state["runs"]))
            row = {"run-id": answer["run-id"], "status": "running", "app": project["tool"]["flwr"]["app"]}
            state["runs"].insert(0, row)
        case ["ls"]:
            answer["runs"] = state["runs"]
        case ["stop", number]:
            (run,) = (run for run in state["runs"] if run["run-id"] == number)
            run["status"] = "finished:stopped"
        case other:
            raise ValueError(f"no such command: {other}")
    STATE.write_text(json.dumps(state))
    return answer


if __name__ == "__main__":
    try:
        print(json.dumps(main(sys.argv[1:])))
    except ValueError as error:
        log = "Using SuperLink: fedface (127.0.0.1:8000)\n"
        print(json.dumps({"success": False, "error-message": f"{log}\n{error}"}))
