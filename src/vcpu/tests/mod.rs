//! Tests: every exit through `dispatch`, traps, page tables built by hand, harts and their control on threads.

mod control;
mod dispatch;
mod firmware;
mod run;
mod sbi;
mod trap;
mod walk;
