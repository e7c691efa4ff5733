"""A real Slurm cluster on this machine: slurmctld and a slurmd per node, each node in its own namespaces.

A node has its own host name, processes and mounts, so killing its first process is a loss of power, and nothing of the
machine's own /etc is touched. Root is needed, and Debian's slurmctld, slurmd, slurm-client and munge.

    with Cluster(folder) as cluster:
        cluster.command("sinfo")

Partitions: cpu (two nodes), gpu, preempt and spot (two nodes with two GPUs: a job in gpu preempts one in the others,
which is requeued, or cancelled in spot), gpu-large (one node, four GPUs with a type). Character devices stand in for
the GPUs. Slurm's accounting is off and sacct is installed, as on many a small site.

Several clusters can run at once: each has its own ports, its own node names (and by them its own control groups), and
job ids of its own range, from which stages derive the port of torch.distributed.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "squeue", "unshare")
KINDS = {"cpu": (2, 0), "gpu": (2, 2), "big": (1, 4)}
"""Kind of node -> (number of nodes, GPUs per node)."""
TYPES = {"big": "a100"}
"""Kind of node -> the type of its GPUs."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")
# Each is a line of slurm.conf. A requeued job would wait two minutes; see `Cluster.start_now`.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
TaskPlugin=task/none
ProctrackType=proctrack/{proctrack}
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherParams=OverMemoryKill
JobAcctGatherFrequency=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=10
MinJobAge=7200
InactiveLimit=0
GresTypes=gpu
ReturnToService=2
"""


def hindrance() -> str | None:
    """Why no cluster can be started here; None if one can."""
    lacking = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if lacking:
        return f"not found: {', '.join(lacking)}; apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid():
        return "only root can start a cluster in namespaces"
    trial = subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "mount", "--bind", "/etc", "/etc"],
        capture_output=True, text=True, check=False)  # fmt: skip
    return f"this container may not make namespaces: {trial.stderr.strip()}" if trial.returncode else None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(condition: Callable[[], object], what: str, seconds: float = 240) -> object:
    """Waits until `condition` is true and returns its value. Raises AssertionError after the timeout."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.2)
    return found


class Cluster:
    def __init__(self, folder: Path, number: int = 0):
        """
        Args:
            number: of this cluster among those on this machine, below 10.
        """
        self.folder, self.number = folder, number
        self.kinds = {kind: [f"{kind}{10 * number + i}" for i in range(1, n + 1)] for kind, (n, _) in KINDS.items()}
        """Kind -> names of its nodes."""
        self.nodes = {node: KINDS[kind][1] for kind, nodes in self.kinds.items() for node in nodes}
        """Node -> its GPUs."""
        self.processes: dict[str, subprocess.Popen] = {}
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "etc/slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }  # fmt: skip

    # ------------------------------------------------------------------------- up and down

    def __enter__(self) -> "Cluster":
        for name in ("etc", "munge", "state", "small", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        # A disk for tests to fill up: mounted now, so that the nodes have it too.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "small", str(self.folder / "small")], check=True)
        self._configure()
        try:
            self._munge()
            self.start_controller()
            for node in self.nodes:
                self.start_node(node)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait_for_nodes(self) -> None:
        until(lambda: self.node_states() == dict.fromkeys(self.nodes, "idle"), "all nodes are idle")

    def __exit__(self, *_) -> None:
        for name in list(self.processes):
            self.power_off(name)
        subprocess.run(["umount", "--lazy", str(self.folder / "small")], check=True)
        pid = self.folder / "munge/pid"
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGTERM)

    def _configure(self) -> None:
        cgroup = Path("/sys/fs/cgroup/freezer").is_dir()
        ports = {name: free_port() for name in self.nodes}
        types = {node: TYPES[kind] for kind in TYPES for node in self.kinds[kind]}
        lines = [CONF.format(host=socket.gethostname(), port=free_port(), folder=self.folder,
            first_job=10000 * self.number + 1, proctrack="cgroup" if cgroup else "pgid")]  # fmt: skip
        for name, gpus in self.nodes.items():
            gres = f" Gres=gpu:{types[name]}:{gpus}" if name in types else f" Gres=gpu:{gpus}" if gpus else ""
            lines.append(f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={ports[name]} CPUs=16 "
                         f"RealMemory=128000{gres}")  # fmt: skip
        cpu, gpu, big = (",".join(nodes) for nodes in self.kinds.values())
        lines += [
            f"PartitionName=cpu Nodes={cpu} Default=YES MaxTime=1-0 PriorityTier=10",
            f"PartitionName=gpu Nodes={gpu} MaxTime=1-0 PriorityTier=10",
            f"PartitionName=gpu-large Nodes={big} MaxTime=1-0 PriorityTier=10",
            f"PartitionName=preempt Nodes={gpu} MaxTime=1-0 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0",
            f"PartitionName=spot Nodes={gpu} MaxTime=1-0 PriorityTier=1 PreemptMode=CANCEL GraceTime=0",
        ]
        etc = self.folder / "etc"
        (etc / "slurm.conf").write_text("\n".join(lines) + "\n")
        (etc / "gres.conf").write_text("".join(
            f"NodeName={name} Name=gpu {f'Type={types[name]} ' if name in types else ''}File={device}\n"
            for name, gpus in self.nodes.items() for device in DEVICES[:gpus]
        ))  # fmt: skip
        (etc / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"
        )
        (etc / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()} {' '.join(self.nodes)}\n")

    def _munge(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        munge.chmod(0o755)
        files = [f"--{kind}={munge}/{name}" for kind, name in (("socket", "socket"), ("key-file", "key"), ("pid-file",
            "pid"), ("log-file", "log"), ("seed-file", "seed"))]  # fmt: skip
        subprocess.run(["munged", "--force", *files], env=self.environment, check=True, capture_output=True)

    def _start(self, name: str, program: str, namespaces: tuple[str, ...] = ()) -> None:
        """Starts a program with our /etc/hosts and /etc/slurm, in namespaces that end with it; it ends with us."""
        etc = self.folder / "etc"
        setup = f"mkdir -p /etc/slurm && mount --bind {etc} /etc/slurm && mount --bind {etc}/hosts /etc/hosts"
        if name in self.nodes:
            setup += f" && hostname {name}"
        with (self.folder / f"{name}.out").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                ["unshare", "--mount", *namespaces, "sh", "-c", f"{setup} && {program}"],
                env={k: v for k, v in self.environment.items() if k != "SLURM_CONF"}, stdout=output, stderr=output,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def start_controller(self) -> None:
        self._start("slurmctld", "exec slurmctld -D")

    def start_node(self, node: str) -> None:
        # The node's first process outlives slurmd: a node that the controller cannot reach keeps working.
        namespaces = ("--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
        self._start(node, f"slurmd -D -N {node} & wait; exec sleep infinity", namespaces)

    def power_off(self, name: str) -> None:
        """Kills all processes of a node, or the controller, at once."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def cut_off(self, node: str) -> None:
        """Cuts the node off from the controller; its jobs continue and reach the files."""
        [slurmd] = self.pids(node, "slurmd -D")
        os.kill(slurmd, signal.SIGKILL)

    def declare_down(self, node: str) -> None:
        """Marks a node as down, as the controller does half a minute after last hearing from it, or a health check at
        once."""
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=silent")

    def restore(self) -> None:
        """Restores nodes that were powered off, cut off or drained."""
        for node in self.nodes:
            if node in self.processes and not self.pids(node, "slurmd -D"):
                self.power_off(node)
            if node not in self.processes:
                self.start_node(node)
        self.command("scontrol", "update", f"NodeName={','.join(self.nodes)}", "State=RESUME", check=False)
        self.wait_for_nodes()

    # ------------------------------------------------------------------------- asking and telling

    def command(self, *words: str, check: bool = True) -> str:
        """Standard output of one of Slurm's commands."""
        reply = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert not check or reply.returncode == 0, f"{' '.join(words)}: {reply.stderr}"
        return reply.stdout

    def node_states(self) -> dict[str, str]:
        lines = self.command("sinfo", "-h", "-N", "-o", "%N %t", check=False).splitlines()
        return dict(line.split() for line in lines)

    def jobs(self, states: str = "all") -> list[dict[str, str]]:
        """Every job that the controller remembers, as scontrol shows it."""
        fields = {
            "id": "JobID", "state": "State", "name": "Name", "comment": "Comment", "partition": "Partition",
            "nodes": "NodeList", "reason": "Reason", "restarts": "RestartCnt", "gres": "tres-per-node",
            "folder": "WorkDir",
            "memory": "MinMemory", "minutes": "TimeLimit", "cpus": "NumCPUs", "requeue": "Requeue",
            "array": "ArrayJobID",
        }  # fmt: skip
        width = 200
        lines = self.command("squeue", "-h", "-t", states, "-O", ",".join(f"{f}:{width}" for f in fields.values()))
        return [
            {name: line[n * width : (n + 1) * width].strip() for n, name in enumerate(fields)}
            for line in lines.splitlines()
        ]

    def start_now(self) -> None:
        """Starts requeued jobs, which would otherwise wait two minutes."""
        for job in self.jobs("PENDING"):
            if job["reason"] == "BeginTime":
                self.command("scontrol", "update", f"JobId={job['id']}", "StartTime=now", check=False)

    def pids(self, node: str, command: str) -> list[int]:
        """Processes on a node (in its namespace of host names) whose command starts with this regular expression."""
        try:
            space = os.readlink(f"/proc/{self._inside(node)}/ns/uts")
        except (OSError, IndexError):  # it is off
            return []
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or os.readlink(entry / "ns/uts") != space:
                    continue
                if re.match(command, (entry / "cmdline").read_text().replace("\0", " ")):
                    found.append(int(entry.name))
            except OSError:  # it has ended meanwhile
                continue
        return found

    def _inside(self, node: str) -> int:
        """The first process in a node's namespaces."""
        pid = self.processes[node].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
