//! The texts of the help besides the flags.

/// The description of rvmm, in a line.
pub(super) const ABOUT: &str = "Runs virtual machines on RISC-V Linux hosts with KVM";

/// The longer description.
pub(super) const LONG_ABOUT: &str = "\
Runs virtual machines on RISC-V Linux hosts with KVM.

A kernel and an amount of memory are enough: without an initrd, a disk and a root file system the guest gets a small \
built-in prompt. Ctrl-A x ends the machine, Ctrl-A h shows the keys.";

/// The last line of the short help.
pub(super) const SHORT_END: &str = "Examples and longer explanations: rvmm --help";

/// The end of the help of rvmm pager.
pub(super) const PAGER_EXAMPLES: &str = "\
Examples:
  Serve a machine from a snapshot's files:
    rvmm pager --socket /tmp/web.pager --snapshot web.snapshot &
    rvmm restore web.snapshot --pager unix:/tmp/web.pager

  Serve a machine on this host from a snapshot on the host b (state.json and checksum were copied before):
    ssh b rvmm pager --serve tcp:localhost:7000 --snapshot web.snapshot &
    ssh -N -L 7000:localhost:7000 b &
    rvmm pager --socket /tmp/web.pager --from tcp:localhost:7000 &
    rvmm restore web.snapshot --pager unix:/tmp/web.pager";

/// The end of the long help.
pub(super) const EXAMPLES: &str = "\
Examples:
  Boot a kernel to the built-in prompt:
    rvmm --kernel Image --mem 512M

  Four harts, an initramfs and a command line:
    rvmm --kernel Image --mem 2G --cpus 4 --initrd root.cpio --cmdline 'console=ttyS0 quiet'

  A root file system on a disk, a second disk that is read-only:
    rvmm --kernel Image --mem 1G --disk root.img --disk data.img,ro=on --cmdline 'console=ttyS0 root=/dev/vda rw'

  Run in the background, the console on a Unix socket:
    rvmm --kernel Image --mem 512M --serial unix:/tmp/guest.sock --name web &

  A network without privileges, a shared folder (packages passt and virtiofsd):
    rvmm --kernel Image --mem 512M --net user,forward=2222:22 --share work=/srv/work

  A network through a tap interface, created once by root:
    sudo ip tuntap add tap0 mode tap user $USER && sudo ip link set tap0 up
    rvmm --kernel Image --mem 512M --net tap=tap0

  Start a flat binary at the start of RAM, and stop at the first access without memory or device:
    rvmm --mem 64M --load hello.bin@0x8000_0000 --entry 0x8000_0000 --unassigned stop

  Hide the vector extension, switch SBI PMU off, pin hart 0 to host CPU 2:
    rvmm --kernel Image --mem 512M --isa host,-v --sbi -pmu --affinity 0=2

  Record every exit and explain them in a report; inspect a running machine:
    rvmm --kernel Image --mem 512M --trace boot.json; rvmm trace report boot.json -o boot.html
    rvmm stat

  Start a kernel that waits for gdb, which connects with: target remote :1234
    rvmm --kernel Image --mem 512M --gdb tcp:1234

  Save a running machine, and continue it later:
    rvmm snapshot web web.snapshot --stop; rvmm restore web.snapshot

  Show what this host supports:
    rvmm doctor

Exit codes: 0 the guest powered off or was stopped, 1 the host lacks something (see rvmm doctor), 2 a mistake on the
command line or in a file, 3 the guest stopped abnormally, 4 a snapshot cannot be used.";
