//! rvmm, a virtual machine monitor for RISC-V Linux hosts.
//!
//! The crate is the command, [`cli::main`], and a library with the entry point [`vmm::Vmm`]. Three more crates use neither
//! KVM nor `unsafe`: [`rvmm_boot`] turns files into bytes at guest-physical addresses, [`rvmm_devices`] has the device
//! models and the bus, [`rvmm_init`] is process 1 of a guest that boots without an initrd. In boot order:
//!
//! 1. **Parse.** [`cli`] parses the command line. `run` is one of its verbs; others are `doctor`, a report on the host, and, with
//!    the feature `labs`, the exercises of `labs`. As process 1 of a guest, the same executable is that guest's init instead.
//! 2. **Configure.** The flags, a JSON file or an embedding program fill in a [`config::VmConfig`], which is plain data.
//!    [`config::VmConfig::validate`] checks everything that needs neither files nor the host. Failures are [`error::Error`]s.
//! 3. **Build.** [`vmm::Vmm::build`] opens the user's files, KVM and the console ([`terminal`]), and builds a machine.
//!    `machine/build.rs` has the steps in their order: RAM ([`memory`]), VM, harts, interrupt controller, devices at the addresses of
//!    [`layout`], files and device tree, the boot hart's registers.
//! 4. **KVM.** [`kvm`] has all ioctls of KVM. It implements the traits [`hypervisor::Hypervisor`], [`hypervisor::Vm`] and
//!    [`vcpu::hart::Hart`], which are all that other modules know of KVM, so that they build and are tested on any architecture.
//! 5. **Boot files.** [`rvmm_boot`] checks kernel, initrd and command line, assigns their addresses, and writes the device tree. The
//!    kernel file is mapped copy-on-write into guest RAM.
//! 6. **Devices.** [`rvmm_devices::CATALOG`] lists the models. `host` opens their backends: disks, taps, sockets, vhost, and
//!    programs such as virtiofsd. Interrupt lines lead to the in-kernel AIA, or to the PLIC of rvmm.
//! 7. **Harts.** [`vcpu::spawn_hart`] starts one thread per hart, `vcpuN`. It enters the guest with KVM_RUN, and
//!    [`vcpu::dispatch()`] handles each [`vcpu::exit::Exit`]: an access to the [bus](rvmm_devices::Bus), an SBI call, a trap for
//!    the guest, or the end. [`vcpu::Control`] starts, pauses and stops harts from other threads.
//! 8. **I/O.** The thread `io` runs the [`io_loop`], which has the only epoll set: console input, the queues of virtio devices
//!    (ioeventfd, without an exit), the RTC's alarm, [`signals`] and the power [`button`].
//! 9. **Control.** [`vmm`] has the controller, the one thread that owns the machine. Everybody else sends it commands through a
//!    [`vmm::Handle`]: start, pause, resume, reset, inspect; only a stop is immediate.
//! 10. **End.** The first [`vcpu::stop::StopReason`] ends the harts' threads. A reset resets the machine in place, from the open
//!     files; any other reason is the result of [`vmm::Vmm::run`], and the command's exit code.
//!
//! Two modules serve the others: [`riscv`] has what the specifications define (CSRs, SBI, instructions, traps), and `sockets` the
//! listening sockets of rvmm itself.
//!
//! A restored machine's memory may come while it runs, ahead of the guest or from another program: `pager`.
//!
//! A running machine can be observed: `gdb` serves a debugger, [`trace`] records every exit, and [`inspect`] replies to queries on a
//! Unix socket. Without a trace the run loop is compiled without recording.
//!
//! `docs/architecture.md` has the threads, the order of locks, and the reasons for the design.

pub mod button;
pub mod cli;
pub mod config;
pub mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod gdb;
mod host;
pub mod hypervisor;
pub mod inspect;
pub mod io_loop;
#[cfg_attr(not(target_arch = "riscv64"), path = "kvm/absent.rs")]
pub mod kvm;
#[cfg(feature = "labs")]
pub mod labs;
pub mod layout;
mod machine;
pub mod memory;
pub mod migration;
mod pager;
pub mod riscv;
pub mod signals;
pub mod snapshot;
mod sockets;
pub mod terminal;
pub mod trace;
pub mod vcpu;
pub mod vmm;
