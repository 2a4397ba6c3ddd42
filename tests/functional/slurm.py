"""A real Slurm of two nodes on this one machine, in a directory of its own, for tests/functional/test_slurm.py.

In: an empty directory. Out: munged, slurmctld and two slurmd, whose keys, sockets, states and logs lie there and whose
ports were free; clients find them by SLURM_CONF. Needs root and Debian's packages slurmctld, slurmd, slurm-client and
munge. Nothing outside the directory is written, and it refuses where another Slurm is set up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.distributed.ranks import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PR_SET_PDEATHSIG = 1
CONFIGURED = Path("/etc/slurm/slurm.conf")


def why_not() -> str | None:
    """Why Slurm cannot be started here; None if it can."""
    if os.environ.get("LCCP_TEST_SLURM") != "1":
        return "LCCP_TEST_SLURM=1 asks for it"
    if CONFIGURED.exists() or "SLURM_CONF" in os.environ:
        return f"a Slurm is set up here ({os.environ.get('SLURM_CONF', CONFIGURED)})"
    if os.geteuid() != 0:
        return "slurmd needs root"
    if missing := [name for name in PROGRAMS if _program(name) is None]:
        return f"there is no {missing[0]} (apt-get install slurmctld slurmd slurm-client munge)"
    return None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Slurm:
    """Two nodes n1 and n2 of one core each; partitions `main`, and `urgent`, which takes nodes from it."""

    def __init__(self, directory: Path) -> None:
        self.dir, self.conf = directory, directory / "slurm.conf"
        host, ports = socket.gethostname().partition(".")[0], [free_port() for _ in range(3)]
        for name in ("state", "spool/n1", "spool/n2"):
            (directory / name).mkdir(parents=True)
        key = directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.conf.write_text(f"""ClusterName=lccp
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
PlugStackConfig={directory}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=2
SlurmdTimeout=5
ReturnToService=2
KillWait=60
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=4000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
""")
        (directory / "plugstack.conf").touch()
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

    def __enter__(self) -> Slurm:
        try:
            self._start(
                "munged", "--foreground", "--force", f"--key-file={self.dir}/munge.key",
                f"--socket={self.dir}/munge.socket", f"--pid-file={self.dir}/munged.pid",
                f"--log-file={self.dir}/munged.log", f"--seed-file={self.dir}/munged.seed",
            )  # fmt: skip
            self.until((self.dir / "munge.socket").exists, "munged listens")
            self._start("slurmctld", "-D")
            for node in ("n1", "n2"):
                self.start_node(node)
            self.until(lambda: self.call("sinfo", "--noheader", "--format=%t %D") == "idle 2", "two idle nodes", 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End whatever was started here: what it has the pid of, and what carries this SLURM_CONF."""
        for _ in range(3):
            ours = self.processes()
            for process in ours:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(ours, timeout=5)
        for daemon in self.daemons.values():
            daemon.wait(timeout=5)

    def processes(self) -> list[psutil.Process]:
        """Daemons and jobs of this Slurm."""
        pids = {int(path.read_text()) for path in self.dir.glob("*.pid") if path.read_text().strip().isdigit()}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                named = str(self.dir) in " ".join(process.cmdline())
                if process.pid in pids or named or self._is_step(process):
                    found.append(process)
                elif process.environ().get("SLURM_CONF") == str(self.conf):
                    found.append(process)
        return [process for process in found if process.pid != os.getpid()]

    def _is_step(self, process: psutil.Process, node: str = "") -> bool:
        """True of the daemon of a step (of a node), which holds the log of its node open; its environment is lost."""
        log = f"{self.dir}/slurmd.{node}"
        return process.name() == "slurmstepd" and any(file.path.startswith(log) for file in process.open_files())

    def _start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A daemon in the foreground, which dies with this process."""
        prctl = ctypes.CDLL(None).prctl
        with (self.dir / f"{program}.out").open("ab") as out:
            return subprocess.Popen(
                [str(_program(program)), *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env=self.environment, start_new_session=True, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
            )  # fmt: skip

    def start_node(self, node: str) -> None:
        self.daemons[node] = self._start("slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """As a node does that crashes: its daemon, and all that runs on it."""
        self.daemons[node].kill()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == node or self._is_step(process, node):
                    process.kill()
        self.daemons[node].wait(timeout=5)

    def call(self, program: str, *arguments: str, timeout_s: float = 60, **more: str) -> str:
        """What a program prints; its last line on stderr if it fails."""
        command = [program if program not in PROGRAMS else str(_program(program)), *arguments]
        environment = {**self.environment, **more}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout_s)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script: Path, *arguments: str, options: Sequence[str] = (), **more: str) -> str:
        """The number of a job."""
        return self.call("sbatch", "--parsable", *options, str(script), *arguments, **more)

    def job(self, number: str) -> Mapping[str, str]:
        """What scontrol says of it."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", number)))

    def until(self, true, what: str, timeout_s: float = 500.0) -> None:
        """Wait until it is so."""
        end = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > end:
                logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self.dir.glob("*.log"))
                raise AssertionError(f"not within {timeout_s:g} s: {what}\n{logs}")
            time.sleep(0.3)
