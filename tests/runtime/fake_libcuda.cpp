// A libcuda.so.1 that does everything at once on the processor, so that the real cuda-python can be tried without a GPU:
// memory is host memory, kernels are functions of the library that the environment variable LEHR_KERNELS names.
// Captures are refused, since work that is done at once cannot be written down.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

typedef void *Pointer;
typedef unsigned long long Address;

enum { OK = 0, INVALID = 1, INVALID_IMAGE = 200, INVALID_HANDLE = 400, NOT_FOUND = 500, INVALIDATED = 901 };
static const Pointer CONTEXT = (Pointer)5, MODULE = (Pointer)8, STREAM = (Pointer)77, EVENT = (Pointer)9;
static int known(Pointer given, Pointer expected) { return given == expected ? OK : INVALID_HANDLE; }

extern "C" {
int cuInit(unsigned flags) { return flags ? INVALID : OK; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal ? INVALID : OK; }
int cuDevicePrimaryCtxRetain(Pointer *context, int) { return *context = CONTEXT, OK; }
int cuDevicePrimaryCtxRelease_v2(int) { return OK; }
int cuCtxSetCurrent(Pointer context) { return known(context, CONTEXT); }
int cuDeviceGetName(char *name, int length, int) { return snprintf(name, length, "a processor") < 0; }
int cuGetErrorString(int error, const char **text) {
    return *text = error == INVALIDATED ? "the capture is refused" : "something else", OK;
}

int cuModuleLoadData(Pointer *module, const char *image) {
    return *module = MODULE, strstr(image, ".target sm_75") ? OK : INVALID_IMAGE;
}
int cuModuleGetFunction(Pointer *function, Pointer module, const char *name) {
    static Pointer kernels = dlopen(getenv("LEHR_KERNELS"), RTLD_NOW);
    *function = dlsym(kernels, name);
    return *function ? known(module, MODULE) : NOT_FOUND;
}

int cuMemAlloc_v2(Address *address, size_t size) { return *address = (Address)malloc(size), OK; }
int cuMemFree_v2(Address address) { return free((Pointer)address), OK; }
int cuMemHostAlloc(Pointer *address, size_t size, unsigned) { return *address = malloc(size), OK; }
int cuMemFreeHost(Pointer address) { return free(address), OK; }
int cuMemGetInfo_v2(size_t *free, size_t *total) { return *free = 1, *total = 2, OK; }
int cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t size, Pointer stream) {
    return memcpy((Pointer)to, from, size), known(stream, STREAM);
}
int cuMemcpyDtoHAsync_v2(Pointer to, Address from, size_t size, Pointer stream) {
    return memcpy(to, (Pointer)from, size), known(stream, STREAM);
}
int cuMemcpyDtoDAsync_v2(Address to, Address from, size_t size, Pointer stream) {
    return memcpy((Pointer)to, (Pointer)from, size), known(stream, STREAM);
}

int cuStreamCreate(Pointer *stream, unsigned flags) { return *stream = STREAM, flags == 1 ? OK : INVALID; }
int cuStreamDestroy_v2(Pointer stream) { return known(stream, STREAM); }
int cuStreamSynchronize(Pointer stream) { return known(stream, STREAM); }
int cuEventCreate(Pointer *event, unsigned flags) { return *event = EVENT, flags == 2 ? OK : INVALID; }
int cuEventDestroy_v2(Pointer event) { return known(event, EVENT); }
int cuEventRecord(Pointer event, Pointer stream) { return known(event, EVENT) | known(stream, STREAM); }
int cuEventSynchronize(Pointer event) { return known(event, EVENT); }
int cuStreamBeginCapture_v2(Pointer stream, int mode) { return mode == 1 ? known(stream, STREAM) : INVALID; }
int cuStreamEndCapture(Pointer, Pointer *graph) { return *graph = nullptr, INVALIDATED; }

// The kernels of table.cu, by the number of their parameters; the arguments as the driver finds them.
int cuLaunchKernel(Pointer function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                   unsigned, Pointer stream, Pointer *given, Pointer *extra) {
    Dl_info info;
    if (extra || !blocks || !threads || threads > 1024 || !dladdr(function, &info)) return INVALID;
#define P(k) (*(Pointer *)given[k])
#define I(k) (*(int *)given[k])
#define L(k) (*(long long *)given[k])
#define D(k) (*(double *)given[k])
    typedef Pointer A;
    if (strstr(info.dli_sname, "advance")) {
        ((void (*)(A))function)(P(0));
    } else if (strstr(info.dli_sname, "gather")) {
        ((void (*)(A, A, A, int, long long))function)(P(0), P(1), P(2), I(3), L(4));
    } else if (strstr(info.dli_sname, "combine")) {
        ((void (*)(A, A, A, A, A, A, A, A, int, long long))function)(P(0), P(1), P(2), P(3), P(4), P(5), P(6), P(7),
                                                                     I(8), L(9));
    } else {
        ((void (*)(A, A, int, A, A, A, A, A, A, A, A, double, A, long long, long long, long long))function)(
            P(0), P(1), I(2), P(3), P(4), P(5), P(6), P(7), P(8), P(9), P(10), D(11), P(12), L(13), L(14), L(15));
    }
    return known(stream, STREAM);
}

// cuda-python asks for names without the suffix of their version.
int cuGetProcAddress_v2(const char *name, Pointer *function, int, Address, int *status) {
    char full[200];
    static const char *const suffixes[] = {"_v2", ""};
    for (const char *suffix : suffixes) {
        snprintf(full, sizeof full, "%s%s", name, suffix);
        if ((*function = dlsym(RTLD_DEFAULT, full))) break;
        static Dl_info self;
        if (!self.dli_fname) dladdr((Pointer)cuInit, &self);
        if ((*function = dlsym(dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD), full))) break;
    }
    if (status) *status = *function ? 0 : 1;
    return *function ? OK : NOT_FOUND;
}
int cuGetProcAddress(const char *name, Pointer *function, int version, Address flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
}
