//! Sorts the rules of a profile by architecture and number.
use std::collections::BTreeMap;

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator as Operator};

use super::arch::Arch;
use super::value;
use crate::Refused;

/// What a profile amounts to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rules {
    /// What the filter returns where no rule applies.
    pub(super) default: u32,
    pub(super) architectures: BTreeMap<Arch, Calls>,
}

/// The rules of an architecture.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Calls {
    pub(super) by_number: BTreeMap<u32, Rule>,
    /// Numbers above it are unknown to the profile.
    pub(super) last: Option<u32>,
}

/// The rule of a call: the first arm that applies decides, and without one the default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) arms: Vec<Arm>,
}

/// A part of a rule, which applies if all conditions hold. One without conditions is the only one of its rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Arm {
    pub(super) conditions: Vec<Condition>,
    pub(super) action: u32,
}

/// A condition on an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) argument: u32,
    pub(super) test: Test,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Test {
    Ne(u64),
    Lt(u64),
    Le(u64),
    Eq(u64),
    Ge(u64),
    Gt(u64),
    /// The bits of the first, compared with the second.
    Masked(u64, u64),
}

/// Sorts the rules.
pub(super) fn sort(profile: &LinuxSeccomp) -> Result<Rules, Refused> {
    let default = value(profile.default_action(), profile.default_errno_ret(), "linux.seccomp.defaultAction")?;
    let allows = matches!(
        profile.default_action(),
        LinuxSeccompAction::ScmpActAllow | LinuxSeccompAction::ScmpActLog | LinuxSeccompAction::ScmpActTrace
    );
    let mut architectures = BTreeMap::from([(Arch::native()?, Calls::default())]);
    for arch in profile.architectures().iter().flatten() {
        architectures.insert(Arch::parse(*arch)?, Calls::default());
    }
    for (index, call) in profile.syscalls().iter().flatten().enumerate() {
        let field = format!("linux.seccomp.syscalls[{index}]");
        let action = value(call.action(), call.errno_ret(), &field)?;
        let alternatives = alternatives(call.args().as_deref().unwrap_or_default(), &field)?;
        for (arch, calls) in &mut architectures {
            for name in call.names() {
                calls
                    .add(*arch, name, action, &alternatives, default, allows)
                    .map_err(|why| Refused::unsupported(format!("{field}: {name} {why}")))?;
            }
        }
    }
    if allows {
        architectures.values_mut().for_each(|calls| calls.last = None);
    }
    Ok(Rules { default, architectures })
}

impl Calls {
    fn add(
        &mut self,
        arch: Arch,
        name: &str,
        action: u32,
        alternatives: &[Vec<Condition>],
        default: u32,
        allows: bool,
    ) -> Result<(), &'static str> {
        let number = arch.number(name);
        // Also of calls whose rule does nothing.
        self.last = self.last.max(number);
        if action == default {
            return Ok(());
        }
        if let Some(number) = number {
            if alternatives.is_empty() {
                self.insert(arch, number, Arm { conditions: Vec::new(), action })?;
            }
            for conditions in alternatives {
                self.insert(arch, number, Arm { conditions: conditions.clone(), action })?;
            }
        }
        // On x86 a call can also be made through one that does several things, whose arguments are in memory.
        if let Some((number, argument)) = arch.multiplexed(name) {
            if alternatives.is_empty() {
                let condition = Condition { argument: 0, test: Test::Eq(argument) };
                self.insert(arch, number, Arm { conditions: vec![condition], action })?;
            } else if allows {
                return Err("is restricted by arguments, which x86 can hide");
            }
        }
        Ok(())
    }

    /// As libseccomp adds a rule to those that it has: one that always applies covers the others, before and after it, and of several the first counts.
    /// Between rules with conditions its order is its own, so those that both could apply to one call must have the same action.
    fn insert(&mut self, arch: Arch, number: u32, arm: Arm) -> Result<(), &'static str> {
        let arms = &mut self.by_number.entry(number).or_insert_with(|| Rule { arms: Vec::new() }).arms;
        if arms.iter().any(|before| before.conditions.is_empty()) {
            return Ok(());
        }
        if arm.conditions.is_empty() {
            *arms = vec![arm];
            return Ok(());
        }
        if arms.iter().any(|before| before.action != arm.action && !excludes(arch, &before.conditions, &arm.conditions)) {
            return Err("has rules of different actions that can apply to one call");
        }
        arms.push(arm);
        Ok(())
    }
}

/// Whether two lists of conditions never hold both: they compare one argument with different values.
fn excludes(arch: Arch, one: &[Condition], other: &[Condition]) -> bool {
    let cut = |value: u64| if arch.is_short() { value & 0xffff_ffff } else { value };
    one.iter().any(|one| {
        other.iter().filter(|other| other.argument == one.argument).any(|other| match (one.test, other.test) {
            (Test::Eq(one), Test::Eq(other)) => cut(one) != cut(other),
            (Test::Eq(one), Test::Ne(other)) | (Test::Ne(one), Test::Eq(other)) => cut(one) == cut(other),
            _ => false,
        })
    })
}

/// All conditions together; but if two are on the same argument, each alone.
fn alternatives(arguments: &[LinuxSeccompArg], field: &str) -> Result<Vec<Vec<Condition>>, Refused> {
    let conditions: Vec<Condition> = arguments.iter().map(|argument| condition(argument, field)).collect::<Result<_, _>>()?;
    let is_repeated = |condition: &Condition| conditions.iter().filter(|other| other.argument == condition.argument).count() > 1;
    Ok(match () {
        () if conditions.is_empty() => Vec::new(),
        () if conditions.iter().any(is_repeated) => conditions.iter().map(|condition| vec![*condition]).collect(),
        () => vec![conditions],
    })
}

fn condition(argument: &LinuxSeccompArg, field: &str) -> Result<Condition, Refused> {
    let value = argument.value();
    let test = match argument.op() {
        Operator::ScmpCmpNe => Test::Ne(value),
        Operator::ScmpCmpLt => Test::Lt(value),
        Operator::ScmpCmpLe => Test::Le(value),
        Operator::ScmpCmpEq => Test::Eq(value),
        Operator::ScmpCmpGe => Test::Ge(value),
        Operator::ScmpCmpGt => Test::Gt(value),
        Operator::ScmpCmpMaskedEq => Test::Masked(value, argument.value_two().unwrap_or(0)),
    };
    if let Test::Masked(mask, value) = test
        && value & !mask != 0
    {
        return Err(Refused::unsupported(format!("{field}.args[].valueTwo outside of value")));
    }
    match u32::try_from(argument.index()) {
        Ok(argument @ 0..=5) => Ok(Condition { argument, test }),
        Ok(_) | Err(_) => Err(Refused::invalid(format!("{field}.args[].index"), format!("{} is not between 0 and 5", argument.index()))),
    }
}
