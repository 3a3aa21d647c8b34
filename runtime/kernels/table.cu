// What a solver table asks for between two evaluations of the network, for lehr/runtime/device_loop.py.
//
// table.ptx beside this file is what is loaded; tests/runtime/test_kernels.py says how it was made from this one.
//
// Every kernel finds out by itself which row of the table it is at (`row`, a counter in device memory), so that one
// captured step serves all rows. Products and sums are rounded one by one, never fused, as numpy rounds them: a latent
// on the device equals the one that lehr/runtime/loop.py computes, bit by bit.
//
// Shape legend: B samples, E elements of them all, P elements of one sample, Q elements that the network returns of one
// (more than P where it returns a variance too).

#define EACH(i, count)                                                                                                 \
    _Pragma("unroll 1") for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < (count);                                  \
         i += (long long)blockDim.x * gridDim.x)

__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float sum(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double sum(double a, double b) { return __dadd_rn(a, b); }

// Σ factor · source over the terms of this row, into its slot and, as float, `copies` times into the network's input.
// A source that is not negative is a slot; -1 - s is place s of the ring of injected noises.
template <typename T>
__device__ void combine(const int *row, const int *first, const int *source, const double *factor, const int *target,
                        T *slots, const float *noises, float *input, int copies, long long elements) {
    const int i = *row, begin = first[i], end = first[i + 1], slot = target[i];
    EACH(e, elements) {
        T total = 0;
#pragma unroll 1
        for (int k = begin; k < end; ++k) {
            const int from = source[k];
            const T value = from >= 0 ? slots[from * elements + e] : (T)noises[(-1 - from) * elements + e];
            const T term = product(value, (T)factor[k]);
            total = k == begin ? term : sum(total, term);
        }
        if (slot >= 0) slots[slot * elements + e] = total;
#pragma unroll 1
        for (int c = 0; c < copies; ++c) input[c * elements + e] = (float)total;
    }
}

// a · x + b · y; a factor of zero leaves its term out, so that what is not finite stays out too.
template <typename T> __device__ T pair(double a, T x, double b, T y) {
    if (a == 0) return b == 0 ? (T)0 : product(y, (T)b);
    const T first = product(x, (T)a);
    return b == 0 ? first : sum(first, product(y, (T)b));
}

// The network's output, guided where `guided` says that it holds two halves (without the condition, then with it), and
// what the table keeps of this evaluation: bank 0 (Y) and bank 1 (the clipped x_0 estimate), each if it has a slot.
template <typename T>
__device__ void absorb(const int *row, const float *output, int guided, const double *scale, const double *kept_input,
                       const double *kept_output, const double *denoised_input, const double *denoised_output,
                       const int *input_slot, const int *kept_slot, const int *clipped_slot, double limit, T *slots,
                       long long elements, long long per_sample, long long per_output) {
    const int i = *row, kept = kept_slot[i], clipped = clipped_slot[i];
    const long long half = elements / per_sample * per_output;
    EACH(e, elements) {
        const long long at = e / per_sample * per_output + e % per_sample;
        float prediction = output[at];
        if (guided) {
            const float difference = __fsub_rn(output[half + at], prediction);
            prediction = __fadd_rn(prediction, __fmul_rn(difference, (float)scale[i]));
        }
        const T x = slots[input_slot[i] * elements + e], f = (T)prediction;
        if (kept >= 0) slots[kept * elements + e] = pair(kept_input[i], x, kept_output[i], f);
        if (clipped >= 0) {
            const T d = pair(denoised_input[i], x, denoised_output[i], f), most = (T)limit;
            slots[clipped * elements + e] = d < -most ? -most : d > most ? most : d;  // NaN passes
        }
    }
}

#define TABLE_KERNELS(name, T)                                                                                         \
    extern "C" __global__ void lehr_combine_##name(                                                                    \
        const int *row, const int *first, const int *source, const double *factor, const int *target, T *slots,        \
        const float *noises, float *input, int copies, long long elements) {                                           \
        combine<T>(row, first, source, factor, target, slots, noises, input, copies, elements);                        \
    }                                                                                                                  \
    extern "C" __global__ void lehr_absorb_##name(                                                                     \
        const int *row, const float *output, int guided, const double *scale, const double *kept_input,                \
        const double *kept_output, const double *denoised_input, const double *denoised_output, const int *input_slot, \
        const int *kept_slot, const int *clipped_slot, double limit, T *slots, long long elements,                     \
        long long per_sample, long long per_output) {                                                                  \
        absorb<T>(row, output, guided, scale, kept_input, kept_output, denoised_input, denoised_output, input_slot,    \
                  kept_slot, clipped_slot, limit, slots, elements, per_sample, per_output);                            \
    }

TABLE_KERNELS(float32, float)
TABLE_KERNELS(float64, double)

// Row by row what the network is fed at this row of the table: `sources` holds the addresses of `count` pieces for each.
extern "C" __global__ void lehr_gather(const int *row, const unsigned long long *sources, unsigned char *into,
                                       int count, long long bytes) {
    const unsigned long long *from = sources + (long long)*row * count;
    if (bytes % 4 == 0) {
        const long long words = bytes / 4;
        EACH(w, words * count) {
            ((unsigned int *)into)[w] = ((const unsigned int *)from[w / words])[w % words];
        }
        return;
    }
    EACH(b, bytes * count) { into[b] = ((const unsigned char *)from[b / bytes])[b % bytes]; }
}

extern "C" __global__ void lehr_advance(int *row) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *row += 1;
}
