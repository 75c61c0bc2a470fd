//! The machine: built in boot order, run by one thread per hart, ended by a reason.

pub mod vm;
