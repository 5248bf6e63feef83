/* A CUDA runtime without a GPU: device memory is host memory, copies are made at once, kernels do nothing.
   With CUDA_STUB_TRACE=file each call that orders work is a line of it. Every other function of the runtime
   says success (others.inc is written from the library's symbols). */
#include <driver_types.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int capability(void) {
    const char *text = getenv("CUDA_STUB_CAPABILITY");
    return text ? atoi(text) : 80;
}

static FILE *trace(void) {
    static FILE *file;
    const char *path = getenv("CUDA_STUB_TRACE");
    if (!file && path) file = fopen(path, "w");
    return file;
}

#define SAY(...) do { if (trace()) { fprintf(trace(), __VA_ARGS__); fflush(trace()); } } while (0)

static uintptr_t next_handle = 0x1000;

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return 0; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "stub");
    p->major = capability() / 10;
    p->minor = capability() % 10;
    p->multiProcessorCount = 108;
    p->totalGlobalMem = 40ull << 30;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 163 << 10;
    p->regsPerBlock = 65536;
    return 0;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attr, int device) {
    *value = attr == cudaDevAttrComputeCapabilityMajor ? capability() / 10
           : attr == cudaDevAttrComputeCapabilityMinor ? capability() % 10 : 1;
    return 0;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
cudaError_t cudaMemGetInfo(size_t *free_, size_t *total) { *total = 40ull << 30; *free_ = 39ull << 30; return 0; }
const char *cudaGetErrorString(cudaError_t error) { return "stub"; }
const char *cudaGetErrorName(cudaError_t error) { return "stub"; }

/* A line of the program's own among those of the runtime. */
void cuda_stub_mark(const char *text) { SAY("mark %s\n", text); }

cudaError_t cudaMalloc(void **memory, size_t size) {
    *memory = aligned_alloc(512, (size + 511) / 512 * 512);
    SAY("malloc %p %zu\n", *memory, size);
    return 0;
}
cudaError_t cudaFree(void *memory) { SAY("free %p\n", memory); free(memory); return 0; }
cudaError_t cudaHostAlloc(void **memory, size_t size, unsigned flags) {
    *memory = aligned_alloc(512, (size + 511) / 512 * 512);
    SAY("pin %p %zu\n", *memory, size);
    return 0;
}
cudaError_t cudaHostRegister(void *memory, size_t size, unsigned flags) { SAY("pin %p %zu\n", memory, size); return 0; }
cudaError_t cudaFreeHost(void *memory) { free(memory); return 0; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *memory) {
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeUnregistered;
    return 0;
}

static cudaError_t new_handle(void *place, const char *what) {
    *(uintptr_t *)place = next_handle++;
    SAY("%s %#lx\n", what, (unsigned long)*(uintptr_t *)place);
    return 0;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
    new_handle(s, "stream");
    SAY("priority %p %d\n", (void *)*s, priority);
    return 0;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return new_handle(s, "stream"); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { return new_handle(e, "event"); }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return new_handle(e, "event"); }
/* With CUDA_STUB_LAG=1 the device never gets on by itself: an event is reached when the host waits for it. */
static int lags(void) {
    static int answer = -1;
    if (answer < 0) answer = getenv("CUDA_STUB_LAG") != NULL;
    return answer;
}
static char reached[1 << 20];

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    reached[(uintptr_t)e % sizeof reached] = 0;
    SAY("record %p %p\n", (void *)e, (void *)s);
    return 0;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) { return cudaEventRecord(e, s); }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) {
    SAY("wait %p %p\n", (void *)s, (void *)e);
    return 0;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    reached[(uintptr_t)e % sizeof reached] = 1;
    SAY("host_waits event %p\n", (void *)e);
    return 0;
}
cudaError_t cudaEventQuery(cudaEvent_t e) {
    return lags() && !reached[(uintptr_t)e % sizeof reached] ? cudaErrorNotReady : 0;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) { SAY("host_waits stream %p\n", (void *)s); return 0; }
cudaError_t cudaDeviceSynchronize(void) { SAY("host_waits device\n"); return 0; }

static cudaError_t copy(void *to, const void *from, size_t size, int kind, cudaStream_t s, const char *what) {
    memmove(to, from, size);
    SAY("%s %p %p %zu %d %p\n", what, to, from, size, kind, (void *)s);
    return 0;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t s) {
    return copy(to, from, size, kind, s, "copy");
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    return copy(to, from, size, kind, 0, "copy_and_wait");
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t s) {
    memset(to, value, size);
    SAY("set %p %zu %p\n", to, size, (void *)s);
    return 0;
}
/* kernel<<<grid, block, shared, stream>>> leaves its configuration here for the launch. */
static __thread cudaStream_t configured;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t s) {
    configured = s;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, cudaStream_t *s) {
    dim3 one = {1, 1, 1};
    *grid = *block = one;
    *shared = 0;
    *s = configured;
    return 0;
}
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
    SAY("launch %p\n", (void *)s);
    return 0;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
    return cudaLaunchKernel(k, grid, block, args, shared, s);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **args) {
    SAY("launch %p\n", (void *)config->stream);
    return 0;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return 0;
}
#include "others.inc"
