/* An ACL runtime over host memory: what torch_npu's allocator, streams, events and copies
 * need. Streams are synchronous: work is done when the call that queues it returns. Calls
 * that are not here are generated beside this file (acl.py) and abort with their name. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    OK = 0,
    INVALID_PARAM = 100000,
    INVALID_DEVICE = 107001,
    CONTEXT_NULL = 107002,
    OUT_OF_MEMORY = 207001,
    MAX_DEVICES = 64,
    HEADER = 512, /* in front of an allocation: its size and device; keeps the alignment */
    SLACK = 544,  /* torch_npu pads what it asks for, and kernels may read past the end */
    CONTEXTS = 0x1000,
};

static int n_devices = 0;
static int64_t device_bytes = 0;
static int cube_cores = 20;
static char soc_name[64] = "";
static char cann_version[128] = "";

static __thread int current = -1;
static int64_t used[MAX_DEVICES];

/* Called once, before torch_npu is loaded. */
int emulate_npu(int devices, int64_t bytes, int cores, const char *soc, const char *cann) {
    if (devices < 0 || devices > MAX_DEVICES) return INVALID_PARAM;
    n_devices = devices;
    device_bytes = bytes;
    cube_cores = cores;
    snprintf(soc_name, sizeof soc_name, "%s", soc);
    snprintf(cann_version, sizeof cann_version, "%s", cann);
    return OK;
}

int aclInit(const char *config) { return OK; }
int aclFinalize(void) { return OK; }
const char *aclrtGetSocName(void) { return soc_name; }
const char *aclGetRecentErrMsg(void) { return "emulated NPU: there is no device behind this ACL"; }
int aclsysGetCANNVersion(int package, char *version) {
    memset(version, 0, sizeof cann_version);
    strcpy(version, cann_version);
    return OK;
}
int aclsysGetVersionStr(char *package, char *version) {
    strcpy(version, cann_version);
    return OK;
}

/* devices and contexts: a context is its device */
int aclrtGetDeviceCount(uint32_t *count) { *count = n_devices; return OK; }
int aclrtSetDevice(int device) {
    if (device < 0 || device >= n_devices) return INVALID_DEVICE;
    current = device;
    return OK;
}
int aclrtGetDevice(int *device) {
    if (current < 0) return CONTEXT_NULL;
    *device = current;
    return OK;
}
int aclrtResetDevice(int device) { return OK; }
int aclrtGetCurrentContext(void **context) {
    if (current < 0) return CONTEXT_NULL;
    *context = (void *)(uintptr_t)(CONTEXTS + current);
    return OK;
}
int aclrtSetCurrentContext(void *context) {
    current = (int)((uintptr_t)context - CONTEXTS);
    return OK;
}
int aclrtCreateContext(void **context, int device) {
    *context = (void *)(uintptr_t)(CONTEXTS + device);
    return OK;
}
int aclrtGetPrimaryCtxState(int device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = 1;
    return OK;
}
int aclrtGetLogicDevIdByUserDevId(int user, int *logic) { *logic = user; return OK; }
int aclrtDeviceCanAccessPeer(int *can, int a, int b) { *can = 1; return OK; }

/* memory: counted per device, so that a device can be full */
static int allocate(void **out, size_t n) {
    int device = current < 0 ? 0 : current;
    int64_t after = __atomic_add_fetch(&used[device], (int64_t)n, __ATOMIC_SEQ_CST);
    char *base = NULL;
    if (after > device_bytes || posix_memalign((void **)&base, HEADER, n + HEADER + SLACK)) {
        __atomic_sub_fetch(&used[device], (int64_t)n, __ATOMIC_SEQ_CST);
        return OUT_OF_MEMORY;
    }
    ((int64_t *)base)[0] = (int64_t)n;
    ((int64_t *)base)[1] = device;
    *out = base + HEADER;
    return OK;
}
int aclrtMalloc(void **p, size_t n, int policy) { return allocate(p, n); }
int aclrtMallocAlign32(void **p, size_t n, int policy) { return allocate(p, n); }
int aclrtFree(void *p) {
    if (!p) return OK;
    int64_t *base = (int64_t *)((char *)p - HEADER);
    __atomic_sub_fetch(&used[base[1]], base[0], __ATOMIC_SEQ_CST);
    free(base);
    return OK;
}
int aclrtMallocHost(void **p, size_t n) { return posix_memalign(p, 4096, n) ? OUT_OF_MEMORY : OK; }
int aclrtMallocHostWithCfg(void **p, uint64_t n, void *config) { return aclrtMallocHost(p, n); }
int aclrtFreeHost(void *p) { free(p); return OK; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t n, int kind) {
    if (n > room) return INVALID_PARAM;
    memmove(to, from, n);
    return OK;
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t n, int kind, void *stream) {
    return aclrtMemcpy(to, room, from, n, kind);
}
int aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t n, int kind,
                                  void *stream) {
    return aclrtMemcpy(to, room, from, n, kind);
}
int aclrtMemset(void *p, size_t room, int value, size_t n) {
    if (n > room) return INVALID_PARAM;
    memset(p, value, n);
    return OK;
}
int aclrtMemsetAsync(void *p, size_t room, int value, size_t n, void *stream) {
    return aclrtMemset(p, room, value, n);
}
int aclrtGetMemInfo(int attribute, size_t *available, size_t *total) {
    *total = device_bytes;
    *available = device_bytes - (current < 0 ? 0 : used[current]);
    return OK;
}
int aclrtPointerGetAttributes(const void *p, void *attributes) { memset(attributes, 0, 64); return OK; }

/* streams and events */
static int new_stream(void **stream) {
    static int next = 1;
    int *s = malloc(sizeof *s);
    *s = __atomic_fetch_add(&next, 1, __ATOMIC_SEQ_CST);
    *stream = s;
    return OK;
}
int aclrtCreateStream(void **s) { return new_stream(s); }
int aclrtCreateStreamWithConfig(void **s, uint32_t priority, uint32_t flag) { return new_stream(s); }
int aclrtDestroyStream(void *s) { free(s); return OK; }
int aclrtDestroyStreamForce(void *s) { free(s); return OK; }
int aclrtStreamGetId(void *s, int *id) { *id = s ? *(int *)s : 0; return OK; }
int aclrtStreamQuery(void *s, int *status) { *status = 0; return OK; }
int aclrtSynchronizeStream(void *s) { return OK; }
int aclrtSynchronizeDevice(void) { return OK; }
int aclrtLaunchHostFunc(void *s, void (*function)(void *), void *argument) {
    function(argument);
    return OK;
}
typedef struct { int64_t nanoseconds; } event;
int aclrtCreateEventWithFlag(void **e, uint32_t flag) { *e = calloc(1, sizeof(event)); return OK; }
int aclrtCreateEventExWithFlag(void **e, uint32_t flag) { return aclrtCreateEventWithFlag(e, flag); }
int aclrtDestroyEvent(void *e) { free(e); return OK; }
int aclrtRecordEvent(void *e, void *s) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    ((event *)e)->nanoseconds = t.tv_sec * 1000000000LL + t.tv_nsec;
    return OK;
}
int aclrtQueryEventStatus(void *e, int *status) { *status = 1; return OK; }
int aclrtQueryEventWaitStatus(void *e, int *status) { *status = 1; return OK; }
int aclrtEventElapsedTime(float *ms, void *from, void *to) {
    *ms = (((event *)to)->nanoseconds - ((event *)from)->nanoseconds) / 1e6f;
    return OK;
}
int aclrtEventGetTimestamp(void *e, uint64_t *us) { *us = ((event *)e)->nanoseconds / 1000; return OK; }

/* properties; vector cores are twice the cube cores on every chip here */
int aclGetDeviceCapability(uint32_t device, int which, int64_t *value) {
    *value = which == 0 ? cube_cores : which == 1 ? 2 * cube_cores : 0;
    return OK;
}
int aclrtGetDeviceInfo(uint32_t device, int which, int64_t *value) {
    *value = which == 201 ? 2 * cube_cores : which == 301 ? device_bytes : cube_cores;
    return OK;
}
int aclrtGetDeviceResLimit(int device, int type, uint32_t *value) {
    *value = type == 0 ? cube_cores : 2 * cube_cores;
    return OK;
}
int aclrtGetStreamResLimit(void *s, int type, uint32_t *value) {
    return aclrtGetDeviceResLimit(0, type, value);
}
int aclGetCannAttribute(int which, int *value) { *value = 1; return OK; }
int aclrtGetSysParamOpt(int which, int64_t *value) { *value = 0; return OK; }
int aclmdlRICaptureGetInfo(void *s, int *status, void **model) {
    *status = 0;
    if (model) *model = NULL;
    return OK;
}
size_t aclGetCompileoptSize(int option) { return 16; }
int aclGetCompileopt(int option, char *value, size_t n) {
    memset(value, 0, n);
    strncpy(value, "disable", n - 1);
    return OK;
}
int aclSetCompileopt(int option, const char *value) { return OK; }
