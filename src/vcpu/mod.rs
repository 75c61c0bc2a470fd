//! One thread per vCPU: enter the guest, see why it came back, answer, enter again.
//!
//! [`exit`] names every reason, [`hart`] is the seam to KVM, `dispatch` answers an exit, `sbi` and `trap` know the
//! two protocols behind it, `run` is the loop and `control` stops, pauses and resumes it from outside.

pub mod exit;
pub mod hart;
pub mod stop;
