// The floor: the minimal work of any VMM. A KVM_RUN loop that returns a ready UART's status for loads, drops forwarded
// SBI calls, prints bytes stored to the UART, and ends when the guest powers off. It only has the checks that valid
// figures need.
//
// floor IMAGE TREE [aia] [thread]: runs a RISC-V Image and its device tree in 16 MiB at 0x80000000 with one hart. With `aia`
// the VM has the kernel's interrupt controller, with `thread` the process has a second thread, which makes the kernel count
// the users of a descriptor at every call: both add work of the kernel, which such a VMM cannot avoid.
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

// In <linux/kvm.h> since 6.5; Debian 12's is older.
#ifndef KVM_DEV_RISCV_AIA_GRP_CONFIG
#define KVM_DEV_TYPE_RISCV_AIA 11
#define KVM_DEV_RISCV_AIA_GRP_CONFIG 0
#define KVM_DEV_RISCV_AIA_CONFIG_MODE 0
#define KVM_DEV_RISCV_AIA_CONFIG_SRCS 2
#define KVM_DEV_RISCV_AIA_GRP_ADDR 1
#define KVM_DEV_RISCV_AIA_ADDR_APLIC 0
#define KVM_DEV_RISCV_AIA_ADDR_IMSIC(hart) (1 + (hart))
#define KVM_DEV_RISCV_AIA_GRP_CTRL 2
#define KVM_DEV_RISCV_AIA_CTRL_INIT 0
#endif

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

static void set_attr(int device, uint32_t group, uint64_t attr, uint64_t *value) {
	struct kvm_device_attr a = { .group = group, .attr = attr, .addr = (uint64_t)value };
	if (ioctl(device, KVM_SET_DEVICE_ATTR, &a) < 0)
		fail("KVM_SET_DEVICE_ATTR");
}

// An APLIC and one IMSIC, at the same addresses as in rvmm.
static void make_aia(int vm) {
	struct kvm_create_device request = { .type = KVM_DEV_TYPE_RISCV_AIA };
	if (ioctl(vm, KVM_CREATE_DEVICE, &request) < 0)
		fail("KVM_CREATE_DEVICE");
	uint64_t aplic = 0x0d000000, imsic = 0x28000000;
	uint32_t sources = 63;
	set_attr(request.fd, KVM_DEV_RISCV_AIA_GRP_CONFIG, KVM_DEV_RISCV_AIA_CONFIG_SRCS, (uint64_t *)&sources);
	set_attr(request.fd, KVM_DEV_RISCV_AIA_GRP_ADDR, KVM_DEV_RISCV_AIA_ADDR_APLIC, &aplic);
	set_attr(request.fd, KVM_DEV_RISCV_AIA_GRP_ADDR, KVM_DEV_RISCV_AIA_ADDR_IMSIC(0), &imsic);
	set_attr(request.fd, KVM_DEV_RISCV_AIA_GRP_CTRL, KVM_DEV_RISCV_AIA_CTRL_INIT, NULL);
}

static void *idle(void *arg) {
	pause();
	return arg;
}

int main(int argc, char **argv) {
	int aia = 0, thread = 0;
	for (int i = 3; i < argc; i++) {
		aia |= strcmp(argv[i], "aia") == 0;
		thread |= strcmp(argv[i], "thread") == 0;
	}
	if (argc < 3 || argc != 3 + aia + thread) {
		fprintf(stderr, "usage: floor IMAGE TREE [aia] [thread]\n");
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
	if (aia)
		make_aia(vm);
	pthread_t other;
	if (thread && pthread_create(&other, NULL, idle, NULL) != 0)
		fail("pthread_create");
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
