"""``bharat launch``: torchrun's options, warm ranks, and a run that goes on by itself."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous import rendezvous_handler_registry as handlers
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, get_args_parser

from lightning_bharat.cluster.agent import WarmAgent
from lightning_bharat.cluster.bad_nodes import BadNodes
from lightning_bharat.cluster.host_memory import LaunchMemory
from lightning_bharat.cluster.one_host import OneHost
from lightning_bharat.cluster.rank_script import Script
from lightning_bharat.cluster.record import Record
from lightning_bharat.cluster.warm import WarmServer
from lightning_bharat.cluster.warm_ranks import Bench
from lightning_bharat.cluster.watch import Limits
from lightning_bharat.commands.nodes import check
from lightning_bharat.commands.signature import say_error

# What a rank of this package's strategies imports before its first step.
PRELOAD = (
    "torch",
    "lightning.pytorch",
    "torch.distributed.elastic.multiprocessing.errors",
    "lightning_bharat.strategies.hybrid",
    "lightning_bharat.callbacks",
    "lightning_bharat.cluster.rank_script",
)
DESCRIPTION = """\
Starts a script on the ranks of this host, or of several, and keeps it running: a rank that dies, stops or hangs is
found and named, and all ranks begin again within a second or two, in processes that have torch and Lightning imported.
The script goes on from its last checkpoint: write ckpt_path="last" in it.

Example:
    bharat launch --nproc-per-node 4 train.py --width 512
    bharat launch --nproc-per-node 4 -- bharat fit --config config.yaml --ckpt_path last

    bharat launch --check --nnodes 2 --node-rank 0 --master-addr node0 --nproc-per-node 4 train.py

Options are torchrun's, with --max-restarts 10 by default, counted since the run last got on; and --run, --limits,
--preload, --check.
"""
OPTIONS = {
    "run": "the run's folder, where its events are kept (default: the default_root_dir of its Trainer)",
    "limits": "seconds after which a rank is lost, by what it does (default: "
    "stopped=3,setup=600,step=180,validation=180,save=600,end=600)",
    "preload": "modules that are imported once for all ranks and restarts, beside torch and Lightning; with commas",
}
# Of torchrun: what can't be done with ranks that are forked.
REFUSED = ("--no-python", "--run-path", "--numa-binding", "--virtual-local-rank")


class BadOptions(ValueError):
    """Options that can't be done as they are; the message says why."""


def command(words: Sequence[str]) -> NoReturn:
    """:func:`main`, and the end of this process."""
    code = main(words)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # an interpreter that ends aborts a thread that waits for a store, and the process with it


def main(words: Sequence[str]) -> int:
    """Run ``bharat launch`` with ``words``; returns the exit code: 0, 1 after a failure, 2 for bad input."""
    try:
        options = _parse(words)
        script = _script(options)
        limits = Limits.parse(options.limits)
        config = _config(options)
    except ValueError as error:
        say_error("bharat launch", error)
        return 2
    run = options.run or os.environ.get("BHARAT_RUN", "")
    record = Record(Path(run).absolute() if run else None)
    if config.max_nodes > 1 and (why := BadNodes(os.uname().nodename).refuse(record.place)):
        say_error("bharat launch", why)
        return 1
    if options.check:
        return _check(config, record.place)
    bench = Bench(WarmServer((*PRELOAD, *filter(None, options.preload.split(",")))))
    bench.warm_up()
    memory = LaunchMemory([str(record.place), script.name, *script.arguments])
    code = 1
    try:
        code = _run(config, script, limits, record, bench, memory)
        return code
    finally:
        record.settle(Path.cwd())
        bench.clear()
        _let_go(memory, keep=code == 1)


def _let_go(memory: LaunchMemory, keep: bool) -> None:
    if kept := memory.close(keep):
        where = f"the newest step stays in memory, in {kept}"
        print(f"bharat launch: {where}: the same command goes on from it", file=sys.stderr)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser: Any = get_args_parser()
    parser.prog, parser.description = "bharat launch", DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = _bad_options
    for name, text in OPTIONS.items():
        parser.add_argument(f"--{name}", default="", help=text)
    parser.add_argument("--check", action="store_true", help="start no rank: hosts meet, and show what they have")
    if "PET_MAX_RESTARTS" not in os.environ:
        parser.set_defaults(max_restarts=10)
    if "PET_SIGNALS_TO_HANDLE" not in os.environ:  # SIGQUIT asks ranks for their stacks
        parser.set_defaults(signals_to_handle="SIGTERM,SIGINT,SIGHUP")
    options = parser.parse_args(list(words))
    for option in REFUSED:
        if getattr(options, option[2:].replace("-", "_")):
            raise BadOptions(f"{option} can't be done by ranks that are forked; leave it out, or use torchrun")
    return options


def _bad_options(message: str) -> NoReturn:
    raise BadOptions(f"{message}\n(all options: bharat launch --help)")


def _script(options: argparse.Namespace) -> Script:
    name, words = options.training_script, tuple(options.training_script_args)
    if name == "bharat" and not options.module:
        return Script("lightning_bharat.cli", words, module=True, program="bharat")
    if not options.module and not Path(name).is_file():
        raise BadOptions(f"{name} is no file; write the path of a script, -m and a module, or `-- bharat fit ...`")
    return Script(name, words, module=options.module)


def _config(options: argparse.Namespace) -> LaunchConfig:
    """torchrun's, but for its static rendezvous, which knows no restarts: the same options make one that does."""
    if options.standalone or (options.nnodes in ("1", "1:1") and options.rdzv_backend == "static"):
        options.rdzv_backend, options.rdzv_id = "one-host", uuid.uuid4().hex
    elif options.rdzv_backend == "static":
        serves = f"is_host={int(options.node_rank) == 0}"
        options.rdzv_conf = ",".join(filter(None, (options.rdzv_conf, serves)))
        options.rdzv_endpoint = options.rdzv_endpoint or f"{options.master_addr}:{options.master_port or 29500}"
        options.rdzv_backend = "c10d"
        options.rdzv_id = "bharat" if options.rdzv_id == "none" else options.rdzv_id
    del options.master_addr, options.node_rank  # torchrun warns of what it does not use
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        return config_from_args(options)[0]
    except (AssertionError, RuntimeError) as error:
        raise BadOptions(str(error)) from None


def _meeting(config: LaunchConfig) -> RendezvousHandler:
    if config.rdzv_backend == "one-host":
        config.local_addr = config.local_addr or "127.0.0.1"
        return OneHost(config.run_id, config.local_addr)
    # Else torchelastic says where its store is in the first round alone, and a host that comes later waits in vain.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # torchelastic misses a host after 15 seconds, and waits for more than the fewest for 30.
    settings = {"keep_alive_interval": 1, "keep_alive_max_attempt": 8, "last_call_timeout": 5, "read_timeout": 20}
    settings |= config.rdzv_configs
    return handlers.create_handler(
        RendezvousParameters(
            config.rdzv_backend,
            config.rdzv_endpoint,
            config.run_id,
            config.min_nodes,
            config.max_nodes,
            local_addr=config.local_addr,
            **settings,
        )
    )


def _check(config: LaunchConfig, folder: Path) -> int:
    try:
        return check(_meeting(config), config.nproc_per_node, config.local_addr, folder)
    except (RendezvousError, DistError) as error:
        say_error("bharat launch", f"the rendezvous at {config.rdzv_endpoint} failed: {error}")
    return 1


def _run(
    config: LaunchConfig, script: Script, limits: Limits, record: Record, bench: Bench, memory: LaunchMemory
) -> int:
    """With an agent, until the end."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle
    handler = None
    try:
        handler = _meeting(config)
        agent = _agent(config, handler, script, limits, record, bench, memory)
        result = agent.run()
    except SignalException as error:  # the job may go on without this host: the rendezvous stays open
        record.note("end", ok=False, words=f"the launcher got {error.sigval.name}")
        return 128 + error.sigval
    except (RendezvousError, DistError) as error:
        why = f"the rendezvous at {config.rdzv_endpoint} failed: {error} Its host must outlive the run"
        record.note("end", ok=False, words=why)
        say_error("bharat launch", why)
        return 1
    if result is None or not result.is_failed():
        handler.shutdown()
        return 0
    if not agent.leaves:  # else the others go on, and the rendezvous stays open
        handler.shutdown()
    assert agent.failure is not None and agent.decision is not None
    record.note("end", ok=False, words=f"{agent.failure.words}; {agent.decision.why}")
    return 1


def _agent(
    config: LaunchConfig,
    handler: RendezvousHandler,
    script: Script,
    limits: Limits,
    record: Record,
    bench: Bench,
    memory: LaunchMemory,
) -> WarmAgent:
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        rdzv_handler=handler,
        entrypoint=script.name,
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        local_addr=config.local_addr,
        event_log_handler=config.event_log_handler,
    )
    assert config.logs_specs is not None and config.shutdown_timeout is not None
    prefix = config.log_line_prefix_template
    logs, patience = config.logs_specs, config.shutdown_timeout
    return WarmAgent(spec, bench, script, limits, record, logs, memory, prefix, patience, fewest=config.min_nodes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
