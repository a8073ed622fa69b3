/*
 * What a process may ask of the kernel from some moment on (seccomp(2)): the calls that serving an
 * export takes. Those that only an intruder makes end the process; what else there is does not
 * exist, so that a C library that tries new calls goes on with old ones. Both are in the kernel's
 * log. Paths and what pointers lead to cannot be looked at here: that is for the other walls.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* cdef-begin */
bool nd_can_filter_calls(void);
int nd_filter_calls(bool watches, bool by_handle);
/* cdef-end */

#if defined(__x86_64__)
#define ND_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ND_ARCH AUDIT_ARCH_AARCH64
#endif

#ifdef ND_ARCH

/* Often used ones first; others by subject. The lists hold what some architectures have not, or
 * older headers do not know. */
/* clang-format off */
static const uint16_t nd_allowed_calls[] = {
    SYS_statx, SYS_openat2, SYS_close, SYS_preadv2, SYS_pwritev2, SYS_futex, SYS_write, SYS_read,
    SYS_ppoll, SYS_fstat, SYS_openat, SYS_getdents64, SYS_newfstatat, SYS_readlinkat,
#ifdef SYS_poll
    SYS_poll, SYS_open, SYS_readlink, SYS_stat, SYS_lstat, SYS_chmod, SYS_epoll_wait, SYS_select,
    SYS_dup2, SYS_unlink, SYS_rename, SYS_access, SYS_getrlimit, SYS_utimes, SYS_chown, SYS_lchown,
#endif
    /* Data of files */
    SYS_pread64, SYS_pwrite64, SYS_readv, SYS_writev, SYS_preadv, SYS_pwritev, SYS_lseek,
    SYS_fsync, SYS_fdatasync, SYS_sync_file_range, SYS_ftruncate, SYS_truncate, SYS_fallocate,
    SYS_fadvise64, SYS_flock,
    /* Names and attributes */
    SYS_faccessat, 439 /* faccessat2 */, SYS_mkdirat, SYS_mknodat, SYS_symlinkat, SYS_linkat,
    SYS_unlinkat, SYS_renameat, SYS_renameat2, SYS_fchmod, SYS_fchmodat, SYS_fchown, SYS_fchownat, SYS_utimensat, SYS_statfs,
    SYS_fstatfs, SYS_getxattr, SYS_lgetxattr, SYS_fgetxattr, SYS_setxattr, SYS_lsetxattr,
    SYS_fsetxattr, SYS_listxattr, SYS_llistxattr, SYS_flistxattr, SYS_removexattr,
    SYS_lremovexattr, SYS_fremovexattr, SYS_name_to_handle_at, SYS_open_by_handle_at,
#ifdef SYS_fchmodat2
    SYS_fchmodat2,
#endif
    /* As whom */
    SYS_setfsuid, SYS_setfsgid, SYS_capget, SYS_capset, SYS_getuid, SYS_geteuid, SYS_getgid,
    SYS_getegid, SYS_getgroups, SYS_getresuid, SYS_getresgid, SYS_getpid, SYS_getppid, SYS_gettid,
    /* Descriptors, and the socket of a front end */
    SYS_dup, SYS_dup3, SYS_pipe2, SYS_eventfd2, SYS_accept, SYS_accept4, SYS_recvmsg,
    SYS_sendmsg, SYS_recvfrom, SYS_shutdown, SYS_getsockopt, SYS_setsockopt,
    SYS_getsockname, SYS_getpeername,
#ifdef SYS_close_range
    SYS_close_range,
#endif
    /* Waiting */
    SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_pselect6, SYS_nanosleep,
    SYS_clock_nanosleep, SYS_clock_gettime, SYS_clock_getres, SYS_gettimeofday, SYS_timerfd_create,
    SYS_timerfd_settime, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn,
    SYS_rt_sigtimedwait, SYS_rt_sigpending, SYS_rt_sigsuspend, SYS_sigaltstack,
    SYS_restart_syscall,
#ifdef SYS_epoll_pwait2
    SYS_epoll_pwait2,
#endif
    /* Memory and threads */
    SYS_munmap, SYS_mremap, SYS_madvise, SYS_brk, SYS_msync, SYS_set_robust_list,
    SYS_set_tid_address, SYS_sched_yield, SYS_sched_getaffinity, SYS_membarrier, SYS_getcpu, SYS_exit, SYS_exit_group,
#ifdef SYS_rseq
    SYS_rseq,
#endif
#ifdef SYS_futex_waitv
    SYS_futex_waitv,
#endif
    /* About itself */
    SYS_getrandom, SYS_uname, SYS_sysinfo, SYS_getrusage, SYS_getcwd, SYS_umask,
};
/* clang-format on */

/* What the libraries try first, and do without: the flags of clone3 lie behind a pointer, and an
 * io_uring would take no notice of the filter. */
static const uint16_t nd_quiet_calls[] = {
    435 /* clone3 */,
    425 /* io_uring_setup */,
    426 /* io_uring_enter */,
    427, /* and _register */
};

/* No honest daemon comes near these, whatever its libraries do. */
/* clang-format off */
static const uint16_t nd_deadly_calls[] = {
    SYS_execve, SYS_execveat, SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, SYS_bpf,
    SYS_perf_event_open, SYS_userfaultfd, SYS_keyctl, SYS_add_key, SYS_request_key, SYS_chroot,
    SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_kexec_load, SYS_reboot, SYS_swapon, SYS_swapoff,
    SYS_connect, SYS_bind, SYS_listen, SYS_kcmp, SYS_quotactl, SYS_acct, SYS_settimeofday,
    SYS_clock_settime, SYS_sethostname, SYS_setdomainname, 433 /* fspick */,
    438 /* pidfd_getfd */,
#ifdef SYS_modify_ldt
    SYS_modify_ldt, SYS_iopl, SYS_ioperm,
#endif
#ifdef SYS_vfork
    SYS_vfork,
#endif
};
/* clang-format on */

/* What a process is shut in by. */
/* clang-format off */
static const uint16_t nd_building_calls[] = {
    SYS_unshare, SYS_setns, SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chdir, SYS_fchdir,
    428 /* open_tree */, 429 /* move_mount */, 430 /* fsopen */, 431 /* fsconfig */, 432 /* fsmount */,
    442 /* mount_setattr */,
};
/* And what else a process does that starts others and watches over them. */
static const uint16_t nd_watching_calls[] = {
    SYS_clone, SYS_wait4, SYS_kill, SYS_tgkill, SYS_prctl, SYS_prlimit64, SYS_setgroups,
#ifdef SYS_fork
    SYS_fork, /* of musl */
#endif
    SYS_connect, SYS_bind, SYS_listen, SYS_memfd_create, SYS_seccomp,
    444 /* landlock_create_ruleset */, 445 /* landlock_add_rule */, 446 /* landlock_restrict_self */,
};
/* clang-format on */

enum {
    ND_COUNT_BUILDING = sizeof nd_building_calls / sizeof *nd_building_calls,
    ND_COUNT_WATCHING = sizeof nd_watching_calls / sizeof *nd_watching_calls,
    ND_COUNT_QUIET = sizeof nd_quiet_calls / sizeof *nd_quiet_calls,
    ND_COUNT_ALLOWED = sizeof nd_allowed_calls / sizeof *nd_allowed_calls,
    ND_COUNT_DEADLY = sizeof nd_deadly_calls / sizeof *nd_deadly_calls,
    ND_PROGRAM_SIZE = 2 * (ND_COUNT_QUIET + ND_COUNT_ALLOWED + ND_COUNT_DEADLY + ND_COUNT_BUILDING +
                           ND_COUNT_WATCHING) +
        192,
    ND_THREAD = 0x00010000,      /* CLONE_THREAD */
    ND_NAMESPACES = 0x7e020080,  /* CLONE_NEW*, all of them */
    ND_NAME_MEMORY = 0x53564d41, /* PR_SET_VMA: a C library names what it has mapped */
};

typedef struct {
    struct sock_filter code[ND_PROGRAM_SIZE];
    unsigned short length;
} nd_program;

static void nd_emit(nd_program *program, uint16_t code, uint8_t jt, uint8_t jf, uint32_t k) {
    program->code[program->length++] = (struct sock_filter){code, jt, jf, k};
}

static void nd_load(nd_program *program, size_t offset) {
    nd_emit(program, BPF_LD | BPF_W | BPF_ABS, 0, 0, (uint32_t)offset);
}

static void nd_return(nd_program *program, uint32_t action) {
    nd_emit(program, BPF_RET | BPF_K, 0, 0, action);
}

static void nd_answer(nd_program *program, uint32_t call, uint32_t action) {
    nd_emit(program, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, call);
    nd_return(program, action);
}

static void nd_answer_all(nd_program *program, const uint16_t *calls, int count, uint32_t action) {
    for (int at = 0; at < count; at++)
        nd_answer(program, calls[at], action);
}

/* The lower half of an argument: both architectures are little endian. The kernel takes no more of
 * those that are compared here, but for the pointer of sendto(2). */
static size_t nd_argument(int number) {
    return offsetof(struct seccomp_data, args) + (size_t)number * sizeof(uint64_t);
}

static size_t nd_upper(size_t argument) { return argument + sizeof(uint32_t); }

/* A call gets `action` unless a test of an argument, against `k`, comes out as it shall. */
static void nd_require(nd_program *program, uint32_t call, size_t argument, uint16_t test,
                       uint32_t k, bool shall, uint32_t action) {
    nd_emit(program, BPF_JMP | BPF_JEQ | BPF_K, 0, 4, call);
    nd_load(program, argument);
    nd_emit(program, BPF_JMP | test | BPF_K, shall, !shall, k);
    nd_return(program, action);
    nd_load(program, offsetof(struct seccomp_data, nr));
}

/* A call with any bit of `mask` in an argument gets `with`, others `without`. */
static void nd_answer_bits(nd_program *program, uint32_t call, int argument, uint32_t mask,
                           uint32_t with, uint32_t without) {
    nd_emit(program, BPF_JMP | BPF_JEQ | BPF_K, 0, 4, call);
    nd_load(program, nd_argument(argument));
    nd_emit(program, BPF_JMP | BPF_JSET | BPF_K, 0, 1, mask);
    nd_return(program, with);
    nd_return(program, without);
}

/* A call is allowed with these values of an argument only, and else gets `action`. */
static void nd_answer_values(nd_program *program, uint32_t call, int argument,
                             const uint32_t *values, uint8_t count, uint32_t action) {
    nd_emit(program, BPF_JMP | BPF_JEQ | BPF_K, 0, (uint8_t)(2 * count + 2), call);
    nd_load(program, nd_argument(argument));
    for (uint8_t at = 0; at < count; at++)
        nd_answer(program, values[at], SECCOMP_RET_ALLOW);
    nd_return(program, action);
}

static void nd_begin(nd_program *program) {
    nd_load(program, offsetof(struct seccomp_data, arch));
    nd_emit(program, BPF_JMP | BPF_JEQ | BPF_K, 1, 0, ND_ARCH);
    nd_return(program, SECCOMP_RET_KILL_PROCESS);
    nd_load(program, offsetof(struct seccomp_data, nr));
}

/* Sockets and locks of files, and no ways around others' signals and sockets: F_SETOWN sends a
 * signal to anybody, and a datagram socket of a pair reaches any name. */
static void nd_answer_descriptors(nd_program *program, bool watches, uint32_t refuse) {
    const uint32_t commands[] = {F_DUPFD,     F_DUPFD_CLOEXEC, F_GETFD,     F_SETFD,
                                 F_GETFL,     F_SETFL,         F_OFD_GETLK, F_OFD_SETLK,
                                 F_GET_SEALS, F_SETOWN,        F_ADD_SEALS /* last */};
    const uint32_t streams[] = {SOCK_STREAM, SOCK_STREAM | SOCK_CLOEXEC,
                                SOCK_STREAM | SOCK_NONBLOCK,
                                SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK,
                                SOCK_SEQPACKET | SOCK_CLOEXEC /* last: for who watches */};
    const uint32_t ioctls[] = {FIONBIO, FIOCLEX, FIONCLEX, FIONREAD, TCGETS};
    const uint8_t count = sizeof commands / sizeof *commands;
    nd_answer_values(program, SYS_fcntl, 1, commands, watches ? count : count - 2, refuse);
    nd_answer_values(program, SYS_ioctl, 1, ioctls, sizeof ioctls / sizeof *ioctls, refuse);
    nd_require(program, SYS_socketpair, nd_argument(0), BPF_JEQ, AF_UNIX, true, refuse);
    const uint8_t kinds = sizeof streams / sizeof *streams;
    nd_answer_values(program, SYS_socketpair, 1, streams, watches ? kinds : kinds - 1, refuse);
    nd_require(program, SYS_sendto, nd_argument(4), BPF_JEQ, 0, true, refuse);
    nd_require(program, SYS_sendto, nd_upper(nd_argument(4)), BPF_JEQ, 0, true, refuse);
    nd_answer(program, SYS_sendto, SECCOMP_RET_ALLOW);
}

static void nd_write_program(nd_program *program, bool watches) {
    const uint32_t refuse = SECCOMP_RET_ERRNO | EPERM, unknown = SECCOMP_RET_ERRNO | ENOSYS;
    const uint32_t prctls[] = {PR_SET_NAME, PR_GET_NAME, ND_NAME_MEMORY};
    const uint32_t own[] = {(uint32_t)getpid()};
    nd_begin(program);
    nd_answer_all(program, nd_allowed_calls, ND_COUNT_ALLOWED, SECCOMP_RET_ALLOW);
    nd_answer_all(program, nd_quiet_calls, ND_COUNT_QUIET, SECCOMP_RET_ALLOW);
    if (watches)
        nd_answer_all(program, nd_watching_calls, ND_COUNT_WATCHING, SECCOMP_RET_ALLOW);
    nd_answer_descriptors(program, watches, refuse);
    if (watches) /* sockets of exports that are added, and who answers at their paths already */
        nd_require(program, SYS_socket, nd_argument(0), BPF_JEQ, AF_UNIX, true, refuse);
    nd_answer(program, SYS_socket, watches ? SECCOMP_RET_ALLOW : refuse);
    /* Nothing is executed that was not there at the start. */
    nd_answer_bits(program, SYS_mmap, 2, PROT_EXEC, refuse, SECCOMP_RET_ALLOW);
    nd_answer_bits(program, SYS_mprotect, 2, PROT_EXEC, refuse, SECCOMP_RET_ALLOW);
    /* Threads, no processes, in no namespaces of their own. */
    nd_require(program, SYS_clone, nd_argument(0), BPF_JSET, ND_NAMESPACES, false, refuse);
    nd_answer_bits(program, SYS_clone, 0, ND_THREAD, SECCOMP_RET_ALLOW, refuse);
    nd_answer_values(program, SYS_tgkill, 0, own, 1, refuse);
    nd_answer_values(program, SYS_prlimit64, 0, (const uint32_t[]){0}, 1, refuse);
    nd_answer_values(program, SYS_prctl, 0, prctls, sizeof prctls / sizeof *prctls, refuse);
    nd_answer(program, SYS_kill, refuse);
#ifdef SYS_fork
    nd_answer(program, SYS_fork, refuse);
#endif
    nd_answer_all(program, nd_deadly_calls, ND_COUNT_DEADLY, SECCOMP_RET_KILL_PROCESS);
    nd_answer_all(program, nd_building_calls, ND_COUNT_BUILDING,
                  watches ? SECCOMP_RET_ALLOW : SECCOMP_RET_KILL_PROCESS);
    nd_return(program, unknown); /* and every call of x32, whose numbers have a bit of their own */
}

static int nd_install(const nd_program *program, unsigned int flags) {
    struct sock_fprog filter = {program->length, (struct sock_filter *)program->code};
    /* Without SPEC_ALLOW every thread would lose store bypass, for the sake of others' secrets that
     * it does not hold. */
    flags |= SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    long result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &filter);
    return result < 0 ? -errno : result ? -ESRCH : 0; /* a thread that did not take it */
}

bool nd_can_filter_calls(void) { return true; }

/* For all threads, for good, and for processes that they start. `watches`: it starts others, which
 * shut themselves in. Two filters: what the second refuses is in the kernel's log. */
int nd_filter_calls(bool watches, bool by_handle) {
    nd_program loud = {.length = 0}, quiet = {.length = 0};
    nd_write_program(&loud, watches);
    nd_begin(&quiet);
    nd_answer_all(&quiet, nd_quiet_calls, ND_COUNT_QUIET, SECCOMP_RET_ERRNO | ENOSYS);
    if (!by_handle) /* as the kernel answers who has not the capability for it: it is tried */
        nd_answer(&quiet, SYS_open_by_handle_at, SECCOMP_RET_ERRNO | EPERM);
    nd_return(&quiet, SECCOMP_RET_ALLOW);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return -errno;
    int error = nd_install(&quiet, 0);
    return error ? error : nd_install(&loud, SECCOMP_FILTER_FLAG_LOG);
}

#else /* nobody has tried it on this architecture */

bool nd_can_filter_calls(void) { return false; }

int nd_filter_calls(bool watches, bool by_handle) {
    (void)watches;
    (void)by_handle;
    return -ENOTSUP;
}

#endif
