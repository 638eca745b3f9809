use oci_spec::runtime::LinuxSeccomp;
use serde_json::{Value, json};

use super::arch::{Arch, X32_BIT};
use super::interpret::{Call, run};
use super::program::{Instruction, assemble};
use super::rules::{self, Arm, Condition, Rule, Rules, Test};

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_THREAD;
const DENIED: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
const UNKNOWN: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

fn profile(json: Value) -> LinuxSeccomp {
    serde_json::from_value(json).expect("a profile")
}

fn program(json: Value) -> Vec<Instruction> {
    assemble(&rules::sort(&profile(json)).expect("accepted"))
}

fn call(arch: Arch, name: &str, arguments: &[u64]) -> Call {
    let mut all = [0; 6];
    all[..arguments.len()].copy_from_slice(arguments);
    Call { number: arch.number(name).expect("a call"), audit: arch.audit(), arguments: all }
}

fn result(program: &[Instruction], call: &Call) -> u32 {
    run(program, call).0
}

/// In the style of Docker's.
fn allow_list() -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            { "names": ["read", "write", "exit", "execve", "ioctl", "socket", "no_such_call"], "action": "SCMP_ACT_ALLOW" },
            { "names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{ "index": 0, "value": 0, "op": "SCMP_CMP_EQ" }] },
            { "names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{ "index": 0, "value": 0xffff_ffff_u64, "op": "SCMP_CMP_EQ" }] },
            { "names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [{ "index": 0, "value": 0x7E02_0000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }] },
            { "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 },
            { "names": ["faccessat2"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1 },
        ],
    })
}

#[test]
#[cfg(target_arch = "x86_64")]
fn an_allow_list_allows_what_it_names() {
    let program = program(allow_list());
    let on = |name: &str, arguments: &[u64]| result(&program, &call(Arch::X86_64, name, arguments));
    assert_eq!(on("read", &[]), ALLOW);
    assert_eq!(on("execve", &[]), ALLOW);
    assert_eq!(on("mount", &[]), DENIED);
    assert_eq!(on("personality", &[0]), ALLOW);
    assert_eq!(on("personality", &[0xffff_ffff]), ALLOW);
    assert_eq!(on("personality", &[8]), DENIED);
    assert_eq!(on("personality", &[1 << 32]), DENIED);
    assert_eq!(on("clone", &[0x11]), ALLOW);
    assert_eq!(on("clone", &[0x1000_0000]), DENIED);
    assert_eq!(on("clone3", &[]), UNKNOWN);
}

#[test]
#[cfg(target_arch = "x86_64")]
fn numbers_above_every_named_one_do_not_exist() {
    let program = program(allow_list());
    let mut call = call(Arch::X86_64, "faccessat2", &[]);
    assert_eq!(result(&program, &call), DENIED);
    call.number += 1;
    assert_eq!(result(&program, &call), UNKNOWN);
    call.number = 0x3fff_ffff;
    assert_eq!(result(&program, &call), UNKNOWN);
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_list_of_forbidden_calls_leaves_unknown_ones_alone() {
    let program = program(json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{ "names": ["mount"], "action": "SCMP_ACT_ERRNO" }] }));
    assert_eq!(result(&program, &call(Arch::X86_64, "mount", &[])), DENIED);
    let unknown = Call { number: 9999, audit: Arch::X86_64.audit(), arguments: [0; 6] };
    assert_eq!(result(&program, &unknown), ALLOW);
}

#[test]
#[cfg(target_arch = "x86_64")]
fn other_architectures_kill_unless_they_are_listed() {
    let list = program(allow_list());
    assert_eq!(result(&list, &call(Arch::X86, "read", &[])), ALLOW);
    assert_eq!(result(&list, &call(Arch::X32, "read", &[])), ALLOW);
    assert_eq!(result(&list, &call(Arch::X32, "ioctl", &[])), ALLOW);
    assert_eq!(call(Arch::X32, "ioctl", &[]).number, X32_BIT | 514);
    assert_eq!(result(&list, &call(Arch::Aarch64, "read", &[])), KILL);
    let native = program(json!({ "defaultAction": "SCMP_ACT_ALLOW" }));
    assert_eq!(result(&native, &call(Arch::X86_64, "read", &[])), ALLOW);
    for arch in [Arch::X86, Arch::X32] {
        assert_eq!(result(&native, &call(arch, "read", &[])), KILL, "{arch:?}");
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn the_calls_of_x86_that_do_several_things_follow_the_rules_of_each() {
    let program = program(allow_list());
    assert_eq!(result(&program, &call(Arch::X86, "socketcall", &[1])), ALLOW);
    assert_eq!(result(&program, &call(Arch::X86, "socketcall", &[2])), DENIED);
    let forbidden = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"],
        "syscalls": [{ "names": ["socket"], "action": "SCMP_ACT_ERRNO", "args": [{ "index": 0, "value": 40, "op": "SCMP_CMP_EQ" }] }],
    });
    assert!(rules::sort(&profile(forbidden)).is_err());
}

#[test]
fn two_conditions_on_one_argument_are_alternatives() {
    let list = json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{ "names": ["kill"], "action": "SCMP_ACT_ALLOW", "args": [
            { "index": 1, "value": 0, "op": "SCMP_CMP_EQ" }, { "index": 1, "value": 9, "op": "SCMP_CMP_EQ" },
        ] }],
    });
    let program = program(list);
    let native = Arch::native().expect("known");
    for (signal, expected) in [(0, ALLOW), (9, ALLOW), (15, DENIED)] {
        assert_eq!(result(&program, &call(native, "kill", &[1, signal])), expected);
    }
}

#[test]
fn what_cannot_be_expressed_is_refused() {
    let with =
        |call: Value| json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{ "names": ["read"], "action": "SCMP_ACT_ALLOW" }, call] });
    for call in [
        json!({ "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 70_000 }),
        json!({ "names": ["kill"], "action": "SCMP_ACT_ALLOW", "args": [{ "index": 6, "value": 0, "op": "SCMP_CMP_EQ" }] }),
        json!({ "names": ["kill"], "action": "SCMP_ACT_ALLOW", "args": [{ "index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ" }] }),
    ] {
        let text = call.to_string();
        assert!(super::compile(&profile(with(call))).is_err(), "{text}");
    }
}

#[test]
fn every_action_becomes_the_kernels() {
    for (action, expected) in [
        ("SCMP_ACT_KILL", KILL),
        ("SCMP_ACT_KILL_THREAD", KILL),
        ("SCMP_ACT_KILL_PROCESS", libc::SECCOMP_RET_KILL_PROCESS),
        ("SCMP_ACT_TRAP", libc::SECCOMP_RET_TRAP),
        ("SCMP_ACT_ERRNO", libc::SECCOMP_RET_ERRNO | 7),
        ("SCMP_ACT_TRACE", libc::SECCOMP_RET_TRACE | 7),
        ("SCMP_ACT_LOG", libc::SECCOMP_RET_LOG),
        ("SCMP_ACT_NOTIFY", libc::SECCOMP_RET_USER_NOTIF),
        ("SCMP_ACT_ALLOW", ALLOW),
    ] {
        let program =
            program(json!({ "defaultAction": "SCMP_ACT_TRAP", "syscalls": [{ "names": ["read"], "action": action, "errnoRet": 7 }] }));
        assert_eq!(result(&program, &call(Arch::native().expect("known"), "read", &[])), expected, "{action}");
    }
}

#[test]
fn an_agent_is_there_if_calls_are_handed_on_and_only_then() {
    let compile = |change: Value| {
        let mut json = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_NOTIFY" }], "listenerPath": "/agent" });
        change.as_object().expect("an object").iter().for_each(|(key, value)| json[key] = value.clone());
        super::compile(&profile(json)).map_err(|error| error.to_string())
    };
    let agent = |change: Value| compile(change).expect("accepted").agent;
    assert_eq!(agent(json!({})), Some(crate::plan::Agent { path: "/agent".to_owned(), metadata: String::new() }));
    assert_eq!(agent(json!({ "listenerMetadata": "m" })).map(|agent| agent.metadata).as_deref(), Some("m"));
    assert_eq!(agent(json!({ "syscalls": [] })), None);
    let killable = json!(["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]);
    assert_eq!(compile(json!({ "flags": killable })).expect("accepted").flags, super::WAIT_KILLABLE_RECEIVE);
    for (change, words) in [
        (json!({ "defaultAction": "SCMP_ACT_NOTIFY" }), "linux.seccomp.defaultAction: SCMP_ACT_NOTIFY cannot be used as default action"),
        (json!({ "syscalls": [{ "names": ["read", "write"], "action": "SCMP_ACT_NOTIFY" }] }), "cannot be used for the write syscall"),
        (json!({ "listenerPath": "" }), "linux.seccomp.listenerPath: is not set"),
        (json!({ "listenerPath": "agent" }), "linux.seccomp.listenerPath: is not an absolute path"),
        (json!({ "listenerPath": "", "listenerMetadata": "m" }), "linux.seccomp.listenerMetadata: needs listenerPath"),
        (json!({ "syscalls": [], "flags": killable }), "linux.seccomp.flags: SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV needs SCMP_ACT_NOTIFY"),
    ] {
        let error = compile(change).expect_err("refused");
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_call_costs_few_instructions() {
    let names: Vec<String> = syscalls::x86_64::Sysno::iter().map(|call| call.name().to_owned()).filter(|name| name != "mount").collect();
    let every_other: Vec<&String> = names.iter().step_by(2).collect();
    let program = program(json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{ "names": every_other, "action": "SCMP_ACT_ALLOW" }] }));
    let native = Arch::native().expect("known");
    let most = (0..500).map(|number| run(&program, &Call { number, audit: native.audit(), arguments: [0; 6] }).1).max();
    assert!(most <= Some(16), "{most:?}");
}

/// Numbers that look random, the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// One of the values that comparisons go wrong at.
    fn value(&mut self) -> u64 {
        const EDGES: [u64; 8] = [0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 0x1_0000_0000, 0x1_0000_0001, u64::MAX];
        EDGES[self.below(8) as usize].wrapping_add(self.below(3)).wrapping_sub(1)
    }
}

fn random_profile(random: &mut Random) -> Value {
    const ACTIONS: [&str; 5] = ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_LOG", "SCMP_ACT_TRAP"];
    const TESTS: [&str; 7] =
        ["SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"];
    // Those that a libseccomp of some years ago knows too.
    let names: Vec<&str> =
        syscalls::x86_64::Sysno::iter().filter(|call| call.id() < 440 && !matches!(call.id(), 335 | 336)).map(|call| call.name()).collect();
    let many = random.below(150);
    let calls: Vec<Value> = (0..many)
        .map(|_| {
            // A name has one action, now and then another: such profiles are refused, unless one rule covers the other.
            let action = random.below(5);
            let other = if random.below(60) == 0 { action + 1 } else { action };
            let mut one = || names[(random.below(names.len() as u64 / 5) * 5 + other % 5) as usize];
            let chosen: Vec<&str> = [one(), one(), one()].to_vec();
            let arguments: Vec<Value> = (0..random.below(3))
                .map(|_| {
                    let value = random.value();
                    json!({ "index": random.below(6), "op": TESTS[random.below(7) as usize], "value": value, "valueTwo": random.value() & value })
                })
                .collect();
            json!({ "names": chosen, "action": ACTIONS[action as usize], "errnoRet": 7, "args": arguments })
        })
        .collect();
    json!({
        "defaultAction": ACTIONS[random.below(5) as usize],
        "architectures": if random.below(2) == 0 { json!([]) } else { json!(["SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_X86_64"]) },
        "syscalls": calls,
    })
}

/// What rules mean, without a program.
fn meaning(rules: &Rules, call: &Call) -> u32 {
    let is_x32 = call.audit == Arch::X86_64.audit() && call.number & X32_BIT != 0;
    let arch = [Arch::X86_64, Arch::X86, Arch::X32].into_iter().find(|arch| arch.audit() == call.audit && (*arch == Arch::X32) == is_x32);
    let Some((arch, calls)) = arch.and_then(|arch| rules.architectures.get(&arch).map(|calls| (arch, calls))) else { return KILL };
    if calls.last.is_some_and(|last| call.number > last) {
        return UNKNOWN;
    }
    let arms = calls.by_number.get(&call.number).map_or(&[][..], |rule| &rule.arms[..]);
    let applies = |arm: &&Arm| arm.conditions.iter().all(|one| holds(arch, one, call));
    arms.iter().find(applies).map_or(rules.default, |arm| arm.action)
}

fn holds(arch: Arch, condition: &Condition, call: &Call) -> bool {
    let cut = |value: u64| if arch.is_short() { value & 0xffff_ffff } else { value };
    let argument = cut(call.arguments[condition.argument as usize]);
    match condition.test {
        Test::Ne(value) => argument != cut(value),
        Test::Lt(value) => argument < cut(value),
        Test::Le(value) => argument <= cut(value),
        Test::Eq(value) => argument == cut(value),
        Test::Ge(value) => argument >= cut(value),
        Test::Gt(value) => argument > cut(value),
        Test::Masked(mask, value) => argument & cut(mask) == cut(value),
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn programs_mean_what_their_rules_say() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut accepted = 0;
    for _ in 0..300 {
        let json = random_profile(&mut random);
        let Ok(rules) = rules::sort(&profile(json)) else { continue };
        accepted += 1;
        let program = assemble(&rules);
        for instruction in &program {
            assert!(instruction.code != super::program::JUMP || (instruction.operand as usize) < program.len());
        }
        for _ in 0..500 {
            let audit = [Arch::X86_64, Arch::X86_64, Arch::X86, Arch::Arm][random.below(4) as usize].audit();
            let bit = if random.below(4) == 0 { X32_BIT } else { 0 };
            let arguments = std::array::from_fn(|_| random.value());
            let call = Call { number: random.below(560) as u32 | bit, audit, arguments };
            assert_eq!(result(&program, &call), meaning(&rules, &call), "{call:?}");
        }
    }
    assert!(accepted > 30, "only {accepted} profiles were accepted");
}

/// The program of libseccomp for a profile. `None` without that library.
fn of_libseccomp(profile: &Value) -> Option<Vec<Instruction>> {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let mut command = Command::new("python3");
    command.args(["-c", include_str!("libseccomp.py")]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().ok()?;
    child.stdin.take().expect("a pipe").write_all(profile.to_string().as_bytes()).ok()?;
    let output = child.wait_with_output().expect("an output");
    let error = String::from_utf8_lossy(&output.stderr);
    if error.contains("libseccomp.so.2: cannot open") {
        return None;
    }
    assert!(output.status.success(), "{error}");
    let hex = String::from_utf8(output.stdout).expect("text");
    let bytes: Vec<u8> =
        (0..hex.trim().len() / 2).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("hexadecimal")).collect();
    let instruction = |bytes: &[u8; 8]| Instruction {
        code: u16::from_ne_bytes([bytes[0], bytes[1]]),
        if_true: bytes[2],
        if_false: bytes[3],
        operand: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
    };
    Some(bytes.as_chunks::<8>().0.iter().map(instruction).collect())
}

/// Values at and beside those that the rules compare with.
fn interesting(rules: &Rules, random: &mut Random) -> u64 {
    let conditions: Vec<&Condition> = rules
        .architectures
        .values()
        .flat_map(|calls| calls.by_number.values())
        .flat_map(|rule| rule.arms.iter().flat_map(|arm| &arm.conditions))
        .collect();
    if conditions.is_empty() || random.below(3) == 0 {
        return random.value();
    }
    let value = match conditions[random.below(conditions.len() as u64) as usize].test {
        Test::Ne(value) | Test::Lt(value) | Test::Le(value) | Test::Eq(value) | Test::Ge(value) | Test::Gt(value) => value,
        Test::Masked(mask, value) => value | (random.value() & !mask),
    };
    value.wrapping_add(random.below(3)).wrapping_sub(1)
}

/// But for the numbers that do not exist, which runc adds to libseccomp's program.
fn compare_with_libseccomp(json: &Value, random: &mut Random) -> Option<bool> {
    let Ok(mut rules) = rules::sort(&profile(json.clone())) else { return Some(false) };
    rules.architectures.values_mut().for_each(|calls| calls.last = None);
    let ours = assemble(&rules);
    let theirs = of_libseccomp(json)?;
    for number in 0..560 {
        for arch in [Arch::X86_64, Arch::X86, Arch::X32, Arch::Aarch64] {
            let rule = rules.architectures.get(&arch).and_then(|calls| calls.by_number.get(&number));
            if rule.is_some_and(is_merged_wrongly) {
                continue;
            }
            for _ in 0..3 {
                let bit = if arch == Arch::X32 { X32_BIT } else { 0 };
                let mut arguments: [u64; 6] = std::array::from_fn(|_| interesting(&rules, random));
                if arch.is_short() {
                    arguments.iter_mut().for_each(|argument| *argument &= 0xffff_ffff);
                }
                let call = Call { number: number | bit, audit: arch.audit(), arguments };
                let (our, their) = (result(&ours, &call), result(&theirs, &call));
                assert!(our == their || is_known(arch, number), "{arch:?} {call:?}: {our:#x}, libseccomp {their:#x}; {json}");
            }
        }
    }
    Some(true)
}

/// libseccomp 2.5.4 merges alternatives that compare the order of one argument: below 0, or at least 2^64 - 2, holds for 2^32 - 1 there.
fn is_merged_wrongly(rule: &Rule) -> bool {
    let is_order = |condition: &Condition| !matches!(condition.test, Test::Eq(_) | Test::Ne(_) | Test::Masked(..));
    rule.arms.len() > 1 && rule.arms.iter().flat_map(|arm| &arm.conditions).any(is_order)
}

/// Numbers that x32 does not have: the kernel refuses them whatever a filter says.
fn is_known(arch: Arch, number: u32) -> bool {
    arch == Arch::X32 && number < 512
}

/// Each pair of rules for one call in each order, and what it amounts to.
#[test]
#[cfg(target_arch = "x86_64")]
fn rules_of_different_actions_decide_as_with_libseccomp() {
    let rule = |action: &str, args: Value| json!({ "names": ["kill"], "action": action, "errnoRet": 7, "args": args });
    let compare = |index: u64, op: &str, value: u64| json!({ "index": index, "op": format!("SCMP_CMP_{op}"), "value": value });
    let always = json!([]);
    let nine = json!([compare(1, "EQ", 9)]);
    let fifteen = json!([compare(1, "EQ", 15)]);
    let not_nine = json!([compare(1, "NE", 9)]);
    let mut random = Random(7);
    let pairs = [(&always, &always), (&always, &nine), (&nine, &always), (&nine, &fifteen), (&fifteen, &nine), (&nine, &not_nine)];
    let actions = ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_LOG"];
    for (number, (first, second)) in pairs.into_iter().enumerate() {
        let (one, other) = (actions[number % 4], actions[(number + 1) % 4]);
        let rules = json!([rule(one, first.clone()), rule(other, second.clone())]);
        let profile =
            json!({ "defaultAction": "SCMP_ACT_TRAP", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "syscalls": rules });
        match compare_with_libseccomp(&profile, &mut random) {
            None => return eprintln!("skipped: needs python3 and libseccomp.so.2"),
            Some(is_accepted) => assert!(is_accepted, "{profile}"),
        }
    }
    // Which of these comes first is libseccomp's own affair.
    for (first, second) in [
        (nine.clone(), json!([compare(0, "EQ", 1)])),
        (nine.clone(), json!([compare(1, "GT", 1)])),
        (nine.clone(), nine.clone()),
        (json!([compare(1, "EQ", 9), compare(0, "EQ", 1)]), nine),
    ] {
        let rules = json!([rule("SCMP_ACT_ALLOW", first), rule("SCMP_ACT_ERRNO", second)]);
        let error = rules::sort(&profile(json!({ "defaultAction": "SCMP_ACT_TRAP", "syscalls": rules }))).expect_err("refused").to_string();
        assert!(error.contains("linux.seccomp.syscalls[1]: kill has rules of different actions"), "{error}");
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn programs_decide_as_those_of_libseccomp() {
    let mut random = Random(0x0123_4567_89ab_cdef);
    let mut compared = 0;
    let mut profiles = vec![allow_list()];
    profiles.extend((0..8).map(|_| random_profile(&mut random)));
    for profile in profiles {
        match compare_with_libseccomp(&profile, &mut random) {
            None => return eprintln!("skipped: needs python3 and libseccomp.so.2"),
            Some(accepted) => compared += u64::from(accepted),
        }
    }
    assert!(compared > 3, "only {compared} profiles were compared");
}
