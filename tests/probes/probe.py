#!/usr/bin/env python3
"""The same probes for several build tools: what must rebuild, what must not, what must survive.

usage: python3 tests/probes/probe.py [TOOL…]

Each tool gets the same two steps: `count` writes the number of lines of in.txt to mid.txt, and
`copy` copies mid.txt to out.txt. Both append their name to runs.log, which no tool knows of. A tool
that is not installed is left out. Prints a table in Markdown.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEP = """#!/bin/sh
# step.sh NAME IN OUT LOG [SLEEP]: half of the output first, the rest after a while.
echo "$1" >> "$4"
case $1 in
  count) text=$(wc -l < "$2" | tr -d ' ') ;;
  copy)  text=$(cat "$2") ;;
esac
printf '%s' "$text" | cut -c1-1 > "$3"
sleep "$(cat "$(dirname "$4")/sleep" 2>/dev/null || echo 0)"
printf '%s\\n' "$text" > "$3"
"""


class Tool:
    """A project of one tool in a folder of its own."""

    def __init__(self, dir):
        self.dir = dir
        self.write("in.txt", "a\nb\n")
        self.write("step.sh", STEP)
        (dir / "step.sh").chmod(0o755)
        self.setup()
        time.sleep(1.1)  # for tools that compare whole seconds

    def path(self, name):
        return self.dir / name

    def write(self, name, text):
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_text(text)

    def start(self):
        return subprocess.Popen(
            self.command(), cwd=self.dir, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, env={**os.environ, **self.env()})

    def env(self):
        return {}

    def build(self):
        """Builds, and says which steps ran."""
        before = len(self.runs())
        code = self.start().wait(timeout=300)
        return self.runs()[before:], code

    def runs(self):
        log = self.path("runs.log")
        return log.read_text().split() if log.exists() else []

    def output(self):
        out = self.output_file()
        return out.read_text().strip() if out.exists() else None

    def output_file(self):
        return self.path("out.txt")

    def unlock(self):
        """What a person would do after a crash, if the tool says so."""


class Ninja(Tool):
    name, program = "ninja", "ninja"

    def setup(self):
        self.write("build.ninja", """rule step
  command = ./step.sh $name $in $out runs.log
  restat = 1
build mid.txt: step in.txt
  name = count
build out.txt: step mid.txt
  name = copy
""")

    def command(self):
        return ["ninja"]


class Make(Tool):
    name, program = "make", "make"

    def setup(self):
        self.write("Makefile", """out.txt: mid.txt
\t./step.sh copy mid.txt out.txt runs.log
mid.txt: in.txt
\t./step.sh count in.txt mid.txt runs.log
.DELETE_ON_ERROR:
""")

    def command(self):
        return ["make"]


class Snakemake(Tool):
    name, program = "snakemake", "snakemake"

    def setup(self):
        self.write("Snakefile", """rule copy:
    input: "mid.txt"
    output: "out.txt"
    shell: "./step.sh copy {input} {output} runs.log"
rule count:
    input: "in.txt"
    output: "mid.txt"
    shell: "./step.sh count {input} {output} runs.log"
""")

    def command(self):
        return ["snakemake", "--cores", "2", "--rerun-incomplete", "--nolock", "out.txt"]


class Dvc(Tool):
    name, program = "dvc", "dvc"

    def setup(self):
        self.write("dvc.yaml", """stages:
  count:
    cmd: ./step.sh count in.txt mid.txt runs.log
    deps: [in.txt]
    outs: [mid.txt]
  copy:
    cmd: ./step.sh copy mid.txt out.txt runs.log
    deps: [mid.txt]
    outs: [out.txt]
""")
        for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
            subprocess.run(command, cwd=self.dir, check=True, capture_output=True)

    def command(self):
        return ["dvc", "repro", "-q"]


class Turbo(Tool):
    name, program = "turbo", "turbo"

    def setup(self):
        package = '{"name": "%s", "version": "1.0.0", "scripts": {"build": "%s"}%s}\n'
        self.write("package.json", '{"name": "p", "packageManager": "npm@10.0.0", "workspaces": ["packages/*"]}\n')
        self.write("package-lock.json", '{"name": "p", "lockfileVersion": 3, "packages": {"": {"name": "p"}}}\n')
        self.write("turbo.json", '{"tasks": {"build": {"dependsOn": ["^build"], "outputs": ["*.txt"], "inputs": ["in.txt"]}}}\n')
        self.write("packages/count/package.json", package % ("count", "../../step.sh count in.txt mid.txt ../../runs.log", ""))
        self.write("packages/copy/package.json", package % ("copy", "../../step.sh copy ../count/mid.txt out.txt ../../runs.log", ', "dependencies": {"count": "*"}'))
        self.path("in.txt").rename(self.path("packages/count/in.txt"))
        subprocess.run(["git", "init", "-q"], cwd=self.dir, check=True)

    def path(self, name):
        place = {"in.txt": "packages/count/in.txt", "mid.txt": "packages/count/mid.txt",
                 "out.txt": "packages/copy/out.txt"}.get(name, name)
        return self.dir / place

    def command(self):
        return ["turbo", "run", "build", "--no-daemon"]

    def env(self):
        return {"TURBO_TELEMETRY_DISABLED": "1", "DO_NOT_TRACK": "1"}


class Anneal(Tool):
    name, program = "anneal", str(ROOT / "target/release/xtask")

    def setup(self):
        for shared in ("Cargo.toml", "Cargo.lock", "rust-toolchain.toml", "crates", "xtask"):
            self.path(shared).symlink_to(ROOT / shared)
        (self.dir / "recipes").mkdir()
        (self.dir / "recipes/demo").symlink_to(ROOT / "recipes/demo")
        step = '''[%s]
step    = "command/run"
program = "{step.sh}"
args    = ["%s", "%s", "{out}/%s", "%s"]
inputs  = ["../step.sh", "%s"]
'''
        log = self.dir / "runs.log"
        self.write("recipes/p.toml",
                   step % ("count", "count", "{in.txt}", "mid.txt", log, "../in.txt")
                   + step % ("copy", "copy", "{count}/mid.txt", "out.txt", log, "count"))

    def command(self):
        # In the sandbox the steps could not write runs.log.
        return [self.program, "--workspace", str(self.dir), "build", "--no-sandbox", "p"]

    def env(self):
        return {"CARGO_TARGET_DIR": str(ROOT / "target")}

    def output_file(self):
        return self.dir / "artifacts/p/copy/out.txt"


def settle():
    time.sleep(2.2)


def restore_times(path, stat):
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def wait_for_count(tool):
    end = time.time() + 60
    while "count" not in tool.runs():
        assert time.time() < end, "its first step never ran"
        time.sleep(0.02)


def early_cutoff(tool):
    tool.build()
    settle()
    tool.write("in.txt", "c\nd\n")
    ran, _ = tool.build()
    return ran == ["count"], f"ran {ran}"


def touch(tool):
    tool.build()
    settle()
    os.utime(tool.path("in.txt"))
    ran, _ = tool.build()
    return ran == [], f"ran {ran}"


def same_size_old_time(tool):
    tool.write("in.txt", "a\nb\n")
    tool.build()
    settle()
    stat = tool.path("in.txt").stat()
    tool.write("in.txt", "\n\n\n\n")
    restore_times(tool.path("in.txt"), stat)
    ran, _ = tool.build()
    return tool.output() == "4", f"output {tool.output()}, ran {ran}"


def changed_while_it_ran(tool):
    tool.write("sleep", "1")
    builder = tool.start()
    wait_for_count(tool)
    time.sleep(0.3)
    tool.write("in.txt", "a\nb\nc\n")
    builder.wait()
    settle()
    tool.build()
    return tool.output() == "3", f"output {tool.output()}"


def killed(tool):
    tool.write("in.txt", "x\n" * 12)
    tool.write("sleep", "1")
    builder = tool.start()
    wait_for_count(tool)
    time.sleep(0.4)
    os.killpg(builder.pid, signal.SIGKILL)
    builder.wait()
    subprocess.run(["pkill", "-9", "-f", f"{tool.dir}/"], check=False)
    tool.unlock()
    tool.build()
    if tool.output() != "12":
        tool.build()
    return tool.output() == "12", f"output {tool.output()}"


def two_at_once(tool):
    tool.write("sleep", "1")
    one, two = tool.start(), tool.start()
    codes = [one.wait(), two.wait()]
    ran = tool.runs()
    good = codes == [0, 0] and tool.output() == "2" and ran.count("count") == 1
    return good, f"exit codes {codes}, ran {ran}"


def altered_output(tool):
    tool.build()
    settle()
    out = tool.output_file()
    stat = out.stat()
    real = out.resolve()
    real.parent.chmod(0o755)
    real.unlink()
    real.write_text("9\n")
    restore_times(real, stat)
    tool.build()
    return tool.output() == "2", f"output {tool.output()}"


def old_time(tool):
    tool.build()
    settle()
    tool.write("in.txt", "a\nb\nc\n")
    os.utime(tool.path("in.txt"), (1_000_000_000, 1_000_000_000))
    tool.build()
    return tool.output() == "3", f"output {tool.output()}"


def retargeted_link(tool):
    tool.write("one.txt", "a\nb\n")
    tool.write("two.txt", "a\nb\nc\n")
    stat = tool.path("one.txt").stat()
    restore_times(tool.path("two.txt"), stat)
    link = tool.path("in.txt")
    link.unlink()
    link.symlink_to(tool.path("one.txt"))
    tool.build()
    settle()
    link.unlink()
    link.symlink_to(tool.path("two.txt"))
    tool.build()
    return tool.output() == "3", f"output {tool.output()}"


PROBES = [
    ("early cut-off: the same intermediate bytes stop it", early_cutoff),
    ("a touch without a change reruns nothing", touch),
    ("an edit of the same size, time restored, is seen", same_size_old_time),
    ("an input that changed while the step ran is not taken for done", changed_while_it_ran),
    ("kill -9 in a step: the next build is right", killed),
    ("two builds at once: each step runs once", two_at_once),
    ("an altered output, times restored, is made right", altered_output),
    ("an edit dated years back is seen", old_time),
    ("a link that leads elsewhere is seen", retargeted_link),
]
TOOLS = [Anneal, Ninja, Make, Snakemake, Dvc, Turbo]


def main():
    wanted = sys.argv[1:]
    tools = [t for t in TOOLS if (t.name in wanted or not wanted) and shutil.which(t.program)]
    rows = {name: [] for name, _ in PROBES}
    for tool in tools:
        for name, probe in PROBES:
            with tempfile.TemporaryDirectory(prefix="probe-", ignore_cleanup_errors=True) as dir:
                try:
                    good, detail = probe(tool(Path(dir)))
                except Exception as error:  # a tool that falls over has not passed
                    good, detail = False, repr(error)
                subprocess.run(["chmod", "-R", "u+w", dir], check=False)
            print(f"{tool.name}: {name}: {'yes' if good else 'NO'} ({detail})", file=sys.stderr)
            rows[name].append("yes" if good else "no")
    print("| probe | " + " | ".join(t.name for t in tools) + " |")
    print("| --- |" + " :---: |" * len(tools))
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")
    passed = [sum(row[i] == "yes" for row in rows.values()) for i in range(len(tools))]
    print("| **passed** | " + " | ".join(f"{n} of {len(PROBES)}" for n in passed) + " |")
    return 0 if all(c[0] == "yes" for c in rows.values()) or tools[0] is not Anneal else 1


if __name__ == "__main__":
    sys.exit(main())
