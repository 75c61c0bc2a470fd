//! The room's tests: every exit through `dispatch`, traps and page tables by hand, harts and their control on threads.

mod control;
mod dispatch;
mod firmware;
mod run;
mod sbi;
mod trap;
mod walk;
