//! rvmm, a virtual machine monitor for RISC-V Linux hosts.

pub mod config;
pub mod error;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod vcpu;
