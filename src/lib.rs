//! rvmm, a virtual machine monitor for RISC-V Linux hosts.

pub mod config;
pub mod error;
pub mod io_loop;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod signals;
pub mod terminal;
pub mod vcpu;
