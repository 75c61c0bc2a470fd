//! Numbers, names and encodings of the RISC-V specifications: pure, and independent of every other module.
//!
//! | file | what is in it | source |
//! |---|---|---|
//! | `csr.rs` | CSRs by number and name | Privileged specification, chapter 2; AIA specification, chapter 2 |
//! | `register.rs` | numbers and names of the integer and floating-point registers | psABI, "Register Convention" |
//! | `trap.rs` | privilege modes, trap causes, bits of `sstatus`, `sie` and `sip` | Privileged specification, chapter 12 |
//! | `sbi.rs` | SBI extensions, functions and errors | SBI specification 3.0 |
//! | `insn.rs` | fields, immediates, lengths and fixed encodings of instructions | Unprivileged specification |
//! | `access.rs` | the memory access of an instruction | Unprivileged specification |
//! | `jump.rs` | jumps and branches | Unprivileged specification |
//! | `zicsr.rs` | CSR instructions | Unprivileged specification, Zicsr |

pub mod access;
pub mod csr;
pub mod insn;
pub mod jump;
pub mod register;
pub mod sbi;
pub mod trap;
pub mod zicsr;
