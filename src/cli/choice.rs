//! The values of flags with a fixed list of words, each with its line for the help.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

use crate::config::{IrqchipChoice, SbiV01, StartMode, TimerChoice, Unassigned};

pub(super) fn irqchip() -> impl TypedValueParser<Value = IrqchipChoice> {
    let values = [
        PossibleValue::new("auto").help("AIA if the host's KVM has it, else a PLIC"),
        PossibleValue::new("aia").help("The AIA of the host's KVM, or an error"),
        PossibleValue::new("plic").help("A PLIC in rvmm"),
    ];
    PossibleValuesParser::new(values).map(|name| match name.as_str() {
        "aia" => IrqchipChoice::Aia,
        "plic" => IrqchipChoice::Plic,
        _ => IrqchipChoice::Auto,
    })
}

pub(super) fn unassigned() -> impl TypedValueParser<Value = Unassigned> {
    let values = [
        PossibleValue::new("zero").help("Reads return zero, writes are ignored"),
        PossibleValue::new("fault")
            .help("The guest takes the access fault that hardware would raise"),
        PossibleValue::new("stop").help("The machine stops with a register dump"),
    ];
    PossibleValuesParser::new(values).map(|name| match name.as_str() {
        "fault" => Unassigned::Fault,
        "stop" => Unassigned::Stop,
        _ => Unassigned::Zero,
    })
}

pub(super) fn start_mode() -> impl TypedValueParser<Value = StartMode> {
    let values = [
        PossibleValue::new("vs").help("Virtual supervisor mode"),
        PossibleValue::new("vu").help(
            "Virtual user mode: privileged instructions trap to rvmm as illegal instructions",
        ),
    ];
    PossibleValuesParser::new(values).map(|name| match name.as_str() {
        "vu" => StartMode::User,
        _ => StartMode::Supervisor,
    })
}

pub(super) fn sbi_v01() -> impl TypedValueParser<Value = SbiV01> {
    let values = [
        PossibleValue::new("auto").help(
            "The host's kernel if it can, else as patch; a Linux kernel's code is not changed",
        ),
        PossibleValue::new("kernel").help("The host's kernel, or an error"),
        PossibleValue::new("patch").help("rvmm, by breakpoints in place of the guest's calls"),
        PossibleValue::new("off").help("None: the guest's code is not changed"),
    ];
    PossibleValuesParser::new(values).map(|name| match name.as_str() {
        "kernel" => SbiV01::Kernel,
        "patch" => SbiV01::Patch,
        "off" => SbiV01::Off,
        _ => SbiV01::Auto,
    })
}

pub(super) fn timer() -> impl TypedValueParser<Value = TimerChoice> {
    let values = [
        PossibleValue::new("kernel").help("KVM, or the hardware"),
        PossibleValue::new("user")
            .help("rvmm: each call that sets it is an exit, and rvmm raises each interrupt"),
    ];
    PossibleValuesParser::new(values).map(|name| match name.as_str() {
        "user" => TimerChoice::User,
        _ => TimerChoice::Kernel,
    })
}
