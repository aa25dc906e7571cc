"""Mutate files for the fuzz tests, and check the outcome."""

import sys

from hypothesis import event
from hypothesis import strategies as st

from gnws_d2.utils.errors import UserError

# Python's audit events of what code in a file may do.
WATCHED = {
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.mkdir", "os.remove", "os.rename",
    "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "urllib.Request",
}  # fmt: skip
watching, seen = [False], []


def audit(name, args):
    if watching[0] and name in WATCHED:
        seen.append((name, args))


sys.addaudithook(audit)


def outcome(function, *args):
    """Return the function's value, or None after a UserError of one line. No code may run."""
    seen.clear()
    watching[0] = True
    try:
        value = function(*args)
    except UserError as e:
        assert str(e) and len(str(e).splitlines()) == 1
        value = None
    finally:
        watching[0] = False
    assert not seen, seen
    event("refused" if value is None else "taken")
    return value


decisions = st.binary(min_size=2, max_size=9)


class Choice:
    """The choices of a mutator, which take one byte after the other, until there are none."""

    def __init__(self, data):
        self.data = list(data[::-1])

    def __bool__(self):
        return bool(self.data)

    def below(self, n):
        value = self.data.pop() if self.data else 0
        if n > 256:
            value = value * 256 + (self.data.pop() if self.data else 0)
        return value % n

    def of(self, values):
        return values[self.below(len(values))]


def mutate_bytes(content, choice, tokens):
    content = bytearray(content)
    while choice:
        kind, at = choice.below(6), choice.below(len(content) + 1)
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content[at : at + 1] = bytes([choice.below(256)])
        elif kind == 2 and at < len(content):
            content[at] ^= 1 << choice.below(8)
        elif kind == 3:
            del content[at : at + choice.below(32)]
        elif kind == 4:
            content[at:at] = content[choice.below(len(content) + 1) :][: choice.below(64)]
        else:
            content[at:at] = choice.of(tokens)
    return bytes(content)
