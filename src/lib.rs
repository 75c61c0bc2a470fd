//! rvmm, a virtual machine monitor for RISC-V Linux hosts.

pub mod button;
pub mod cli;
pub mod config;
pub mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod gdb;
mod host;
pub mod init;
pub mod inspect;
pub mod io_loop;
#[cfg_attr(not(target_arch = "riscv64"), path = "kvm/absent.rs")]
pub mod kvm;
pub mod labs;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod signals;
pub mod terminal;
pub mod trace;
pub mod vcpu;
