"""Programs that try to get out of the sandbox, and rewards of programs that do not."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from scored import rollouts, tokenizer

from fastalign.rl import sandbox
from fastalign.rl.answers import RewardError
from fastalign.rl.code_rewards import STATUSES, Case, CodeReward, CodeSettings, find_program, judge, read_tests
from fastalign.rl.sandbox import Limits, Outcome, Sandbox, SandboxError
from fastalign.rl.scoring import Scorer

isolated = pytest.mark.skipif(
    sandbox.refusal() is not None, reason=f"programs cannot be isolated here: {sandbox.refusal()}"
)


def run(program: str, stdin: str = "", **limits) -> Outcome:
    with Sandbox(program, Limits(**limits)) as one:
        return one.run(stdin)


@pytest.fixture(scope="module")
def victim():
    """A process of the same user with a secret in its environment and its memory."""
    code = "import time; secret = 'in the ' + 'memory'; print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], env={"SECRET": "known"}, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


@isolated
def test_a_program_reads_its_input_and_prints():
    with Sandbox("import sys, math, heapq, re\nprint(sum(map(int, sys.stdin)), math.pi)\nexit()") as one:
        assert one.run("1\n2\n").stdout == "3 3.141592653589793\n"
        assert one.run("é\n").status == "error" and one.run("4\n", "\nprint('never')").stdout.startswith("4 ")
    assert run("print('\\u00e9', input())", "\u00fc") == Outcome("ok", "\u00e9 \u00fc\n", "")
    assert run("import threading\nt = threading.Thread(target=print, args=(1,))\nt.start(); t.join()").stdout == "1\n"
    assert run("open('/tmp/a', 'w').write('b')\nprint(open('a').read())").stdout == "b\n"
    assert run("raise SystemExit(3)") == Outcome("error", "", "")


@isolated
def test_it_sees_no_more_than_itself():
    seen = """
import os, resource
print(os.getpid(), os.getuid() != 0, os.getgid() != 0, sorted(set(os.environ) - {"LC_CTYPE"}))
def opens(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
print([fd for fd in range(3, 64) if opens(fd)])
for folder in ("/usr", os.path.dirname(os.__file__)):
    try: open(f"{folder}/x", "w")
    except OSError as error: print(error.strerror)
print(os.path.exists("/proc/self"), os.path.exists("/dev"), os.path.exists("/etc"), os.path.exists("/home"))
"""
    fixed = "Read-only file system\n" * 2
    assert run(seen).stdout == f"1 True True []\n[]\n{fixed}False False False False\n"


ESCAPES = {
    "socket": "import socket\nsocket.socket()",
    "socket by ctypes": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.socket(2, 1, 0)
raise SystemExit(0 if fd >= 0 else f"errno {ctypes.get_errno()}")""",
    "process": "import os\nos.fork()",
    "process by ctypes": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
raise SystemExit(0 if libc.fork() >= 0 or libc.syscall(57) >= 0 or libc.syscall(435, 0, 0) >= 0 else "no")""",
    "double fork": """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import time
        time.sleep(30)""",
    "shell": "import os\nassert os.system('id') == 0",
    "memory": "x = bytearray(10 ** 10)\nprint(len(x))",
    "memory in pieces": "x = []\nwhile True: x.append(bytearray(10 ** 7))",
    "threads": """
import threading, time
threading.stack_size(32768)
for _ in range(500): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()""",
    "a large file": "f = open('/tmp/x', 'wb')\nfor _ in range(100): f.write(bytes(10 ** 6))",
    "a file outside": "open('{outside}', 'w').write('x')",
    "a file in /usr": "open('/usr/lib/x', 'w').write('x')",
    "a file beside Python": "import os\nopen(os.path.dirname(os.__file__) + '/x', 'w').write('x')",
    "its own program": "open('/program.py', 'a').write('x')",
    "the root folder": "open('/x', 'w')",
    "a secret at home": "print(open('{secret}').read())",
    "the home": "import os\nassert os.path.basename('{secret}') in os.listdir('{home}')",
    "passwords": "print(open('/etc/passwd').read())",
    "environment of the parent": "print(open('/proc/{pid}/environ').read())",
    "memory of the parent": "print(open('/proc/{pid}/mem').read())",
    "proc": "import os\nprint(os.listdir('/proc'))",
    "signal": "import os\nos.kill({pid}, 9)",
    "signal to all": "import os\nos.kill(-1, 9)",
    "trace": """
import ctypes
libc = ctypes.CDLL(None)
raise SystemExit(0 if libc.ptrace(16, {pid}, 0, 0) == 0 else "no")""",
    "memory by number": """
import ctypes
libc = ctypes.CDLL(None)
print(ctypes.c_char_p(b"x" * 8))
raise SystemExit(0 if libc.syscall(310, {pid}, 0, 0, 0, 0, 0) >= 0 else "no")""",
    "mount": """
import ctypes
libc = ctypes.CDLL(None)
raise SystemExit(0 if libc.mount(b"proc", b"/tmp", b"proc", 0, None) == 0 else "no")""",
    "new namespace": """
import ctypes
libc = ctypes.CDLL(None)
raise SystemExit(0 if libc.unshare(0x10000000) == 0 else "no")""",
    "become root": "import os\nos.setuid(0)",
    "chroot": "import os\nos.chroot('/tmp')",
    "another architecture's calls": """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("b814000000cd80c3"))  # getpid of 32 bits: mov eax, 20; int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())""",
}


@isolated
@pytest.mark.parametrize("name", ESCAPES)
def test_no_program_gets_out(name, victim, tmp_path):
    secret, outside = Path.home() / f".fastalign-test-{os.getpid()}", tmp_path / "outside"
    secret.write_text("the secret")
    tmp_path.chmod(0o777)
    places = {"pid": victim.pid, "secret": secret, "home": Path.home(), "outside": outside}
    try:
        code = ESCAPES[name]
        for key, value in places.items():
            code = code.replace(f"{{{key}}}", str(value))
        outcome = run(code, seconds=10, memory_mb=256)
    finally:
        secret.unlink()
    assert outcome.status == "error", outcome
    assert not outside.exists() and victim.poll() is None
    assert not {"secret", "known", "memory", "root:"} & set(outcome.stdout.split())


@isolated
def test_endless_programs_end():
    for program in (
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import os\nos.close(1)\nos.close(2)\nwhile 1: 1",
    ):
        start = time.monotonic()
        assert run(program, seconds=0.4).status == "timeout"
        assert time.monotonic() - start < 5
    outcome = run("while True: print('x' * 10000)", seconds=30, output_kb=64)
    assert outcome.status == "output" and len(outcome.stdout) <= 64 << 10
    assert run("import sys\nwhile True: sys.stderr.write('x' * 10000)", seconds=30, output_kb=64).status == "output"


@isolated
def test_a_program_ends_with_the_process_that_isolates_it():
    one = Sandbox("import time; time.sleep(50)", Limits(seconds=50))
    one.ask(["", ""])
    launcher = one.process.pid
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    deadline = time.monotonic() + 20
    while not children.read_text().split() and time.monotonic() < deadline:
        time.sleep(0.02)
    program = int(children.read_text().split()[0])
    with one:  # leaving it ends the launcher, as its death would
        pass
    while alive(program) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(program)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# Rewards of programs

SUM = "Sure:\n```python\nprint(int(input()) + int(input()))\n```\nDone."
PAIRS = {"inputs": ["1\n2\n", ["3", "4"], "5\n5"], "outputs": ["3\n", ["7"], "11"]}


def test_programs_are_found_in_their_fences():
    assert find_program("```py\na = 1\n```\n```\nb\n```\n```bash\nls\n```") == "b"
    assert find_program("```cpp\nint\n```") == "int" and find_program("print(1)") == "print(1)"
    assert find_program("```python\nprint('cut off") == "print('cut off"


def test_tests_are_read_in_the_forms_they_come_in():
    pairs = [Case("1", "2"), Case("3", "4")]
    for tests in (
        {"inputs": ["1", "3"], "outputs": ["2", "4"]},
        '{"input": ["1", "3"], "output": ["2", "4"]}',
        [{"input": "1", "output": "2"}, {"input": "3", "output": 4}],
        {"inputs": [["1"], "3"], "outputs": ["2", 4], "fn_name": None},
    ):
        assert read_tests(tests, "t") == pairs
    assert read_tests(["assert f() == 1"], "t") == read_tests("\nassert f() == 1\n", "t")
    assert read_tests("def g():\n    assert f()\ng()", "t")[0].assertion.endswith("g()")
    assert read_tests(None, "t") == read_tests([], "t") == []
    for tests, words in (
        (5, "column 't': expected tests such as .* got a number"),
        ("{'inputs': [1]", "expected tests as JSON or assertions, got other text"),
        ({"inputs": ["1"], "outputs": []}, "expected as many inputs as outputs, got a list of strings and a list"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}, "a list of arguments in each input for the function 'f'"),
    ):
        with pytest.raises(ValueError, match=words):
            read_tests(tests, "t")


VERDICTS = [
    ("print(int(input()) + int(input()))", 2, "wrong", "10"),
    ("print(3)", 1, "wrong", "3"),
    ("print(int(input()) + 1", 0, "compile_error", "SyntaxError: '(' was never closed"),
    ("if 1:\nprint(1)", 0, "compile_error", "IndentationError: expected an indented block"),
    ("exec('1 +')", 0, "error", "SyntaxError: invalid syntax"),
    ("raise KeyError(1)", 0, "error", "KeyError: 1"),
    ("import time; time.sleep(9)", 0, "timeout", ""),
    ("while True: print('x' * 10 ** 5)", 0, "output", ""),
]


@isolated
@pytest.mark.parametrize("program, passed, status, message", VERDICTS)
def test_programs_are_judged(program, passed, status, message):
    verdict = judge(program, read_tests(PAIRS, "t"), Limits(seconds=0.5 if status == "timeout" else 20))
    assert verdict[:2] == (passed, status) and verdict.message.startswith(message)


@isolated
def test_assertions_must_be_reached_and_hold():
    tests = read_tests(["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 0"], "t")
    assert judge("def f(x): return x + 1", tests, Limits())[:2] == (2, "error")
    for early in ("exit()", "import os\nos._exit(0)", "print('done')\nraise SystemExit"):
        assert judge(early, tests[:1], Limits())[:2] == (0, "wrong")


@isolated
def test_functions_are_called_with_the_arguments_of_a_test():
    tests = read_tests({"fn_name": "f", "inputs": [[1, 2], [[], [3]]], "outputs": [3, [[3]]]}, "t")
    assert judge("def f(a, b): return a + b", tests, Limits()) == (2, "passed", "")
    method = "class Solution:\n    def f(self, a, b): return a"
    assert judge(method, tests, Limits())[:2] == (0, "wrong")
    assert judge("def f(a, b): return {a}", tests, Limits())[:2] == (0, "error")


@isolated
def test_code_rewards_are_shares_of_tests_passed():
    rewards = [
        {"code": {"tests": "io", "timeout": 20}},
        {"code": {"tests": "io", "all_or_nothing": True}, "name": "all", "weight": 2},
    ]
    scorer = Scorer(rewards, tokenizer())
    good = {**PAIRS, "outputs": ["3", "7", "10"]}
    futures = [scorer.submit(rollouts("add", SUM, "print("), {"io": tests}) for tests in (PAIRS, good)]
    assert scorer.collect(futures).tolist() == [[2 / 3, 0], [0, 0], [1, 1], [0, 0]]
    assert np.isnan(scorer.submit(rollouts("add", SUM), {"io": None}).result().table).all()
    counts = scorer.take_counts()
    assert [counts[f"code/{status}"] for status in STATUSES] == [1, 1, 0, 0, 0, 2]
    assert [counts[f"all/{status}"] for status in STATUSES] == [1, 1, 0, 0, 0, 2]
    with pytest.raises(RewardError, match=r"reward code fails on sample 0 of the prompt 'add' .*: column 'io'"):
        scorer.collect([scorer.submit(rollouts("add", SUM), {"io": 5})])
    with pytest.raises(ValueError, match="reward code reads 'io', which is no column of the data"):
        scorer.submit(rollouts("add", SUM), {})
    scorer.close()


def test_programs_end_with_the_run():
    reward, refused = CodeReward(CodeSettings("tests", timeout=60, unsafe=True)), []

    def score():
        try:
            reward.score("while True: pass", ["assert True"])
        except SandboxError as error:
            refused.append(str(error))

    thread = threading.Thread(target=score)
    thread.start()
    while not reward._running:
        time.sleep(0.01)
    (running,) = reward._running
    reward.close()
    thread.join(timeout=10)
    assert running.process.poll() == -signal.SIGKILL
    score()
    assert refused[0].startswith("its launcher ended") and refused[1] == "the run has ended"


@pytest.mark.parametrize(
    "code, words",
    [
        ("tests", r"rewards\[0\].code: expected a mapping that names the column of tests"),
        ({"timeout": 5}, r"rewards\[0\].code: expected a mapping that names the column of tests"),
        ({"tests": "t", "memory": 5}, r"unknown key 'memory' in rewards\[0\].code: did you mean 'memory_mb'"),
        ({"tests": "t", "language": "c"}, r"rewards\[0\].code.language: expected one of python, got a string"),
        ({"tests": "t", "timeout": 0}, r"rewards\[0\].code.timeout: expected a number above 0, got 0"),
    ],
)
def test_wrong_settings_of_code_rewards_are_refused(code, words):
    with pytest.raises(ValueError, match=words):
        Scorer([{"code": code}], tokenizer())


def test_without_isolation_programs_are_refused_unless_they_are_trusted(tmp_path):
    """In a user namespace that may make no others, which is how many containers are."""
    unshare = shutil.which("unshare")
    allowed = unshare and subprocess.run([unshare, "-Ur", "true"], capture_output=True).returncode == 0
    code = f"""
import importlib.util, sys
sys.path[:0] = {[str(Path(sandbox.__file__).parents[2])]!r}
from fastalign.rl import sandbox
from fastalign.rl.sandbox import Limits, Sandbox
print(sandbox.refusal())
with Sandbox("print(input(), 5)", Limits(isolated=False)) as one:
    print(one.run("4"))
with Sandbox("import time; time.sleep(60)", Limits(seconds=0.2, isolated=False)) as one:
    print(one.run())
"""
    (tmp_path / "program.py").write_text(code)
    command = [sys.executable, str(tmp_path / "program.py")]
    if allowed:
        command = [unshare, "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"', "sh", *command]
    elif sandbox.refusal() is None:
        pytest.skip("namespaces are permitted, and without util-linux's unshare they cannot be taken away")
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == [
        "make namespaces: No space left on device",
        "Outcome(status='ok', stdout='4 5\\n', stderr='')",
        "Outcome(status='timeout', stdout='', stderr='')",
    ]
