//! rvmm, a virtual machine monitor for RISC-V Linux hosts.
