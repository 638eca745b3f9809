"""Compiles a seccomp profile as runc does, with libseccomp: a profile as JSON on stdin, the program in hexadecimal on stdout."""
import ctypes, json, sys, tempfile

lib = ctypes.CDLL("libseccomp.so.2", use_errno=True)
lib.seccomp_init.restype = ctypes.c_void_p


class Compare(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


ACTIONS = {
    "KILL": 0, "KILL_THREAD": 0, "KILL_PROCESS": 0x80000000, "TRAP": 0x30000, "ERRNO": 0x50000, "TRACE": 0x7FF00000, "LOG": 0x7FFC0000, "ALLOW": 0x7FFF0000,
}
OPERATORS = {"NE": 1, "LT": 2, "LE": 3, "EQ": 4, "GE": 5, "GT": 6, "MASKED_EQ": 7}
ARCHITECTURES = {"X86": 0x40000003, "X86_64": 0xC000003E, "X32": 0x4000003E}


def action(name, errno):
    name = name.removeprefix("SCMP_ACT_")
    return ACTIONS[name] | ((1 if errno is None else errno) if name in ("ERRNO", "TRACE") else 0)


profile = json.load(sys.stdin)
default = action(profile["defaultAction"], profile.get("defaultErrnoRet"))
context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(default)))
for arch in profile.get("architectures") or []:
    lib.seccomp_arch_add(context, ctypes.c_uint32(ARCHITECTURES[arch.removeprefix("SCMP_ARCH_")]))
for call in profile.get("syscalls") or []:
    what = action(call["action"], call.get("errnoRet"))
    compares = [
        Compare(arg["index"], OPERATORS[arg["op"].removeprefix("SCMP_CMP_")], arg["value"], arg.get("valueTwo", 0)) for arg in call.get("args") or []
    ]
    repeated = len({compare.arg for compare in compares}) < len(compares)
    for name in call["names"]:
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if number == -1 or what == default:
            continue
        for some in [[compare] for compare in compares] if repeated else [compares]:
            result = lib.seccomp_rule_add_array(context, ctypes.c_uint32(what), number, len(some), (Compare * len(some))(*some))
            # Of calls that an architecture does not have, or whose arguments are in memory there.
            if result not in (0, -17, -33, -95):
                sys.exit(f"{name}: {result}")
with tempfile.TemporaryFile() as file:
    if lib.seccomp_export_bpf(context, file.fileno()) != 0:
        sys.exit("export")
    file.seek(0)
    print(file.read().hex())
