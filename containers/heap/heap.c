// The shared heap: a preloaded library that puts a server's heap into one shared mapping of an unlinked file.
//
// CRIU copies private memory into images and back out of them. A shared file mapping it only notes, and maps
// again. So on one host memory of any size moves with the process at no cost: the restored copy maps the same pages.
// The checkpoint agent declares the file external to CRIU, the restore agent hands it over by descriptor
// (shared/quicferry/host/heap.py).
//
// How: private anonymous mappings, from which every allocator takes its memory, are cut out of the one mapping. glibc's
// own malloc takes memory from brk(2) and can't be reached, so another malloc is preloaded after this library
// (shared/quicferry/host/berth_init.py).
//
// Two copies of the process share these pages until one of them is gone, so neither may run meanwhile:
// quicferry_stand_still below is how the held server waits without touching anything of it, all its threads included.
// fork(2) would make a second process with the same heap, so it is refused; vfork(2) and posix_spawn(3) work.

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/magic.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define OWNER "QUICFERRY_HEAP_PID"       // the server's PID: a program that it starts inherits this library too
#define FILE_NAME "/run/quicferry-heap" // /run is a tmpfs in a berth
#define MOST (64UL << 30)               // bytes of address space; memory is taken as it is touched
#define PAGE 4096UL
#define HUGE_PAGE (2UL << 20)
#define FREE_RANGES 4096

struct range {
    char *start, *end;
};

// All state is in this library's own private memory.
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool tried;
static struct range heap;
static struct range free_ranges[FREE_RANGES]; // by address, never adjacent
static size_t frees;

static void *kernel_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset) {
    return (void *)syscall(SYS_mmap, addr, length, prot, flags, fd, offset);
}

static bool in_heap(const void *addr) { return (const char *)addr >= heap.start && (const char *)addr < heap.end; }

static size_t whole_pages(size_t length) { return (length + PAGE - 1) & ~(PAGE - 1); }

// An address at which `size` bytes are free and huge pages of the file can be mapped whole; NULL if there is none.
static char *place_for(size_t size) {
    char *at = kernel_mmap(NULL, size + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return NULL;
    syscall(SYS_munmap, at, size + HUGE_PAGE); // a hint is taken where it is free (mmap(2)), and nobody else runs yet
    return (char *)(((uintptr_t)at + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
}

// If it can't be made, everything goes on with private memory. Only on a tmpfs: keys are in it, and a disk would keep them.
// And only the server's own: a child's would be a second one, of which nobody tells CRIU.
static void make(void) {
    tried = true;
    const char *owner = getenv(OWNER);
    if (owner != NULL && strtol(owner, NULL, 10) != getpid()) return;
    struct statfs place;
    int fd = open(FILE_NAME, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0) return;
    unlink(FILE_NAME);
    if (fstatfs(fd, &place) == 0 && place.f_type == TMPFS_MAGIC) {
        // No more than the file system holds: beyond it a write would be SIGBUS, but an allocation just fails.
        size_t size = place.f_bavail * (size_t)place.f_bsize & ~(PAGE - 1);
        if (size > MOST || size == 0) size = MOST;
        if (ftruncate(fd, (off_t)size) == 0) {
            char *at = place_for(size);
            at = kernel_mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
            if (at != MAP_FAILED) {
                heap = (struct range){at, at + size};
                free_ranges[0] = heap;
                frees = 1;
            }
        }
    }
    close(fd);
}

static void *take(size_t length) { // first fit
    for (size_t i = 0; i < frees; i++) {
        struct range *range = &free_ranges[i];
        if ((size_t)(range->end - range->start) < length) continue;
        char *at = range->start;
        range->start += length;
        if (range->start == range->end) memmove(range, range + 1, (--frees - i) * sizeof *range);
        return at;
    }
    return NULL;
}

static void give_back(char *start, char *end) {
    size_t i = 0;
    while (i < frees && free_ranges[i].end < start) i++;
    // Everything that touches or overlaps becomes one range: unmapping twice is no error (munmap(2)).
    size_t last = i;
    for (; last < frees && free_ranges[last].start <= end; last++) {
        if (free_ranges[last].start < start) start = free_ranges[last].start;
        if (free_ranges[last].end > end) end = free_ranges[last].end;
    }
    if (last == i) {
        if (frees == FREE_RANGES) return; // address space is lost, memory is not
        memmove(&free_ranges[i + 1], &free_ranges[i], (frees - i) * sizeof *free_ranges);
        frees++;
    } else {
        memmove(&free_ranges[i + 1], &free_ranges[last], (frees - last) * sizeof *free_ranges);
        frees -= last - i - 1;
    }
    free_ranges[i] = (struct range){start, end};
}

EXPORT void *mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset) {
    const int kept = MAP_FIXED | MAP_FIXED_NOREPLACE | MAP_STACK | MAP_GROWSDOWN | MAP_HUGETLB | MAP_LOCKED | MAP_SHARED;
    bool ours = (flags & MAP_ANONYMOUS) && !(flags & kept) && !(prot & PROT_EXEC) && length;
    if (!ours || length > MOST) return kernel_mmap(addr, length, prot, flags, fd, offset);
    pthread_mutex_lock(&lock);
    if (!tried) make();
    void *at = take(whole_pages(length));
    pthread_mutex_unlock(&lock);
    if (at == NULL) return kernel_mmap(addr, length, prot, flags, fd, offset);
    if (prot != (PROT_READ | PROT_WRITE)) mprotect(at, whole_pages(length), prot);
    return at;
}

EXPORT void *mmap64(void *, size_t, int, int, int, off_t) __attribute__((alias("mmap")));

EXPORT int munmap(void *addr, size_t length) {
    if (!in_heap(addr)) return (int)syscall(SYS_munmap, addr, length);
    char *end = (char *)addr + whole_pages(length);
    if ((uintptr_t)addr % PAGE || !length || end > heap.end) {
        errno = EINVAL;
        return -1;
    }
    mprotect(addr, (size_t)(end - (char *)addr), PROT_READ | PROT_WRITE); // whoever gets it next expects that
    madvise(addr, (size_t)(end - (char *)addr), MADV_REMOVE);
    pthread_mutex_lock(&lock);
    give_back(addr, end);
    pthread_mutex_unlock(&lock);
    return 0;
}

// On private memory these promise zeroes afterwards, and on a shared mapping they would leave the old content.
EXPORT int madvise(void *addr, size_t length, int advice) {
    if (in_heap(addr)) {
        if (advice == MADV_FREE) return 0; // may be done at any later time, or never
        if (advice == MADV_DONTNEED) advice = MADV_REMOVE;
    }
    return (int)syscall(SYS_madvise, addr, length, advice);
}

// Growing in place would run into the neighbour's part of the file.
EXPORT void *mremap(void *old, size_t old_length, size_t length, int flags, ...) {
    if (!in_heap(old)) {
        void *target = NULL;
        if (flags & MREMAP_FIXED) {
            __builtin_va_list arguments;
            __builtin_va_start(arguments, flags);
            target = __builtin_va_arg(arguments, void *);
            __builtin_va_end(arguments);
        }
        return (void *)syscall(SYS_mremap, old, old_length, length, flags, target);
    }
    if (whole_pages(length) <= whole_pages(old_length)) {
        size_t rest = whole_pages(old_length) - whole_pages(length);
        if (rest) munmap((char *)old + whole_pages(length), rest);
        return old;
    }
    if (!(flags & MREMAP_MAYMOVE) || (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP))) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return at;
    memcpy(at, old, old_length);
    munmap(old, old_length);
    return at;
}

EXPORT pid_t fork(void) {
    if (heap.start == NULL) {
        pid_t (*libc_fork)(void);
        *(void **)&libc_fork = dlsym(RTLD_NEXT, "fork");
        return libc_fork();
    }
    static const char why[] = "quicferry: fork refused: the heap is shared memory; set QUICFERRY_HEAP=private\n";
    if (write(2, why, sizeof why - 1) < 0) { /* nobody to tell */ }
    errno = ENOSYS;
    return -1;
}

// --- standing still ------------------------------------------------------------------------------------------

#define HALT (SIGRTMAX - 3)
#define HALT_SECONDS 1.0
#define MOST_THREADS 4096

static _Atomic uint32_t halt; // odd while threads are to halt
static _Atomic uint32_t halted;

static void halt_here(int signal) {
    (void)signal;
    int saved = errno;
    uint32_t now = atomic_load(&halt);
    if (now & 1) { // else the signal is late: that hold is over
        atomic_fetch_add(&halted, 1);
        while (atomic_load(&halt) == now) syscall(SYS_futex, &halt, FUTEX_WAIT, now, NULL, NULL, 0);
    }
    errno = saved;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

// Tell every thread not yet told to halt; whether there were such. Without malloc, hence getdents64(2).
static bool tell_new(int tasks, pid_t *told, size_t *count) {
    bool found = false;
    char entries[4096];
    long length;
    lseek(tasks, 0, SEEK_SET);
    while ((length = syscall(SYS_getdents64, tasks, entries, sizeof entries)) > 0) {
        for (long at = 0; at < length;) {
            struct dirent64 *entry = (struct dirent64 *)(entries + at);
            at += entry->d_reclen;
            pid_t tid = (pid_t)strtol(entry->d_name, NULL, 10);
            size_t i = 0;
            while (i < *count && told[i] != tid) i++;
            if (tid <= 0 || tid == gettid() || i < *count || *count == MOST_THREADS) continue;
            told[(*count)++] = tid;
            syscall(SYS_tgkill, getpid(), tid, HALT);
            found = true;
        }
    }
    return found;
}

static size_t alive(const pid_t *told, size_t count) { // a thread may end before it takes the signal
    size_t there = 0;
    for (size_t i = 0; i < count; i++) there += syscall(SYS_tgkill, getpid(), told[i], 0) == 0;
    return there;
}

// Make every other thread wait in a signal handler, on private memory; whether all do.
static bool halt_others(void) {
    static pid_t told[MOST_THREADS];
    size_t count = 0;
    struct sigaction action = {.sa_handler = halt_here, .sa_flags = SA_RESTART};
    sigfillset(&action.sa_mask);
    int tasks = open("/proc/self/task", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (tasks < 0 || sigaction(HALT, &action, NULL)) return false;
    double end = seconds() + HALT_SECONDS;
    atomic_store(&halted, 0);
    atomic_fetch_add(&halt, 1);
    bool all = true;
    // Until a whole look finds nobody new: a thread that does not halt yet may start others.
    while (all && tell_new(tasks, told, &count))
        while (all && atomic_load(&halted) < alive(told, count)) {
            struct timespec nap = {0, 50000};
            nanosleep(&nap, NULL);
            all = seconds() < end;
        }
    close(tasks);
    return all && count < MOST_THREADS;
}

// Halt all other threads, close the `open` descriptors (the last one's end of file tells that we stand still), wait for
// the blocked signal `wake`, and let the threads go on; exit on the blocked signal `stop`. Nothing here reads or writes the
// heap. -1 with nothing closed if a thread does not halt within a second: it blocks all signals, or there are too many.
EXPORT int quicferry_stand_still(const int *open, int open_count, int wake, int stop) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, wake);
    sigaddset(&set, stop);
    int signal = -1;
    if (halt_others()) {
        for (int i = 0; i < open_count; i++) close(open[i]);
        do signal = (int)syscall(SYS_rt_sigtimedwait, &set, NULL, NULL, sizeof(uint64_t));
        while (signal < 0 && errno == EINTR); // a freeze interrupts it (ptrace(2)), and so does a restore
        if (signal == stop) _exit(0); // our connections belong to another copy, or to nobody
    }
    if (atomic_load(&halt) & 1) {
        atomic_fetch_add(&halt, 1);
        syscall(SYS_futex, &halt, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
    }
    return signal < 0 ? -1 : 0;
}
