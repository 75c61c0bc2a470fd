// The floor: the least that any VMM can do. A KVM_RUN loop that answers loads with a ready UART's status, drops forwarded
// SBI calls, prints what is stored to the UART, and ends when the guest powers off. Nothing is checked beyond what keeps
// the figures honest.
//
// floor IMAGE TREE: runs a RISC-V Image and its device tree in 16 MiB at 0x80000000 with one hart.
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define RAM_BASE 0x80000000ul
#define RAM_SIZE (16ul << 20)
#define IMAGE_AT (2ul << 20)
#define TREE_AT (8ul << 20)
#define UART 0x10000000ul
#define LSR_READY 0x60 // THRE and TEMT
#define SBI_NOT_SUPPORTED (-2l)

static void fail(const char *what) {
	perror(what);
	exit(1);
}

// KVM's index of a core register: pc is 0, x1 to x31 are 1 to 31.
static void set_reg(int vcpu, uint64_t index, uint64_t value) {
	struct kvm_one_reg reg = {
		.id = KVM_REG_RISCV | KVM_REG_SIZE_U64 |
		      KVM_REG_RISCV_CORE | index,
		.addr = (uint64_t)&value,
	};
	if (ioctl(vcpu, KVM_SET_ONE_REG, &reg) < 0)
		fail("KVM_SET_ONE_REG");
}

static void load(const char *path, char *ram, size_t at) {
	int fd = open(path, O_RDONLY);
	if (fd < 0)
		fail(path);
	size_t done = 0;
	for (ssize_t n; (n = read(fd, ram + at + done, RAM_SIZE - at - done)) != 0; done += (size_t)n)
		if (n < 0)
			fail(path);
	close(fd);
}

int main(int argc, char **argv) {
	if (argc != 3) {
		fprintf(stderr, "usage: floor IMAGE TREE\n");
		return 2;
	}
	int kvm = open("/dev/kvm", O_RDWR);
	if (kvm < 0)
		fail("/dev/kvm");
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		fail("KVM_CREATE_VM");
	char *ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (ram == MAP_FAILED)
		fail("mmap");
	load(argv[1], ram, IMAGE_AT);
	load(argv[2], ram, TREE_AT);
	struct kvm_userspace_memory_region slot = {
		.guest_phys_addr = RAM_BASE, .memory_size = RAM_SIZE, .userspace_addr = (uint64_t)ram,
	};
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) < 0)
		fail("KVM_SET_USER_MEMORY_REGION");
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (vcpu < 0)
		fail("KVM_CREATE_VCPU");
	int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	struct kvm_run *run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		fail("mmap of the vCPU");
	set_reg(vcpu, 0, RAM_BASE + IMAGE_AT);
	set_reg(vcpu, 10, 0);
	set_reg(vcpu, 11, RAM_BASE + TREE_AT);
	for (;;) {
		if (ioctl(vcpu, KVM_RUN, 0) < 0)
			fail("KVM_RUN");
		switch (run->exit_reason) {
		case KVM_EXIT_MMIO:
			if (!run->mmio.is_write)
				run->mmio.data[0] = LSR_READY;
			else if (run->mmio.phys_addr == UART && write(1, run->mmio.data, 1) != 1)
				fail("write");
			break;
		case KVM_EXIT_RISCV_SBI:
			run->riscv_sbi.ret[0] = (unsigned long)SBI_NOT_SUPPORTED;
			break;
		case KVM_EXIT_SYSTEM_EVENT:
			return 0;
		default:
			fprintf(stderr, "floor: exit reason %u\n", run->exit_reason);
			return 1;
		}
	}
}
