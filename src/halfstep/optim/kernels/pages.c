/* Huge pages, where the system hands them out on request. */
#include "halfstep.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

int32_t hs_advise(void *data, int64_t bytes) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t)data + page - 1) / page * page; /* only pages that are ours alone */
    const uintptr_t end = ((uintptr_t)data + (uintptr_t)bytes) / page * page;
    if (end <= begin) return 0;
    return madvise((void *)begin, end - begin, MADV_HUGEPAGE);
}
#else
int32_t hs_advise(void *data, int64_t bytes) {
    (void)data;
    (void)bytes;
    return 0;
}
#endif
