// From torch's dispatcher to kernels: boxed functions of torch's stable C interface, one for each op.
//
// A kernel is `entry(pointers to its tensors, M, threads)` of a library of its own, which knows nothing of torch. A boxed
// function of the stable interface has no state, so that there is one for each place of a table, and a place holds what a
// kernel's border looks like. torch's functions are given as pointers: nothing is linked with it.
#include <omp.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace dispatch {

typedef void *Handle;

struct Torch {
    int32_t (*get_dim)(Handle, int64_t *);
    int32_t (*get_sizes)(Handle, int64_t **);
    int32_t (*get_dtype)(Handle, int32_t *);
    int32_t (*is_contiguous)(Handle, bool *);
    int32_t (*get_data_ptr)(Handle, void **);
    int32_t (*empty_strided)(int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, Handle *);
    int32_t (*delete_tensor_object)(Handle);
    int32_t (*call_dispatcher)(const char *, const char *, uint64_t *);
};

// A tensor of a border: sizes, -1 for M.
struct Tensor {
    const char *name;
    int32_t dtype, dim;
    int64_t sizes[4];
};

// A kernel. `tensors`: inputs, weights, outputs; `place`: of each in the order of the kernel's own border.
// `rows`: the tensor that has the axis `axis` of M, -1 if none. `wait` sets `entry`, or `problem` if there is no library.
struct Kernel {
    void (*entry)(void *const *, int64_t, int);
    void (*wait)(int64_t);
    const char *problem;
    const Tensor *tensors;
    const int32_t *place;
    int32_t inputs, given, made, rows, axis;
};

constexpr int PLACES = 1024, MOST = 64;
static Torch torch;
static Kernel *table[PLACES];

// Tensors that a call owns, let go when it ends, however it does.
struct Owned {
    Handle held[2 * MOST];
    int count = 0;
    ~Owned() {
        for (int i = 0; i < count; ++i) torch.delete_tensor_object(held[i]);
    }
    Handle keep(Handle handle) { return held[count++] = handle; }
};

static std::string shape_text(int32_t dim, const int64_t *sizes, int64_t rows) {
    std::string text = "[";
    for (int i = 0; i < dim; ++i) text += (i ? ", " : "") + std::to_string(sizes[i] < 0 ? rows : sizes[i]);
    return text + "]";
}

static void check(int32_t failed, const char *what) {
    if (failed) throw std::runtime_error(std::string("torch: ") + what + " failed");
}

static void check_input(const Tensor &tensor, Handle handle, int64_t rows) {
    int64_t dim, *sizes;
    int32_t dtype;
    check(torch.get_dim(handle, &dim) | torch.get_sizes(handle, &sizes) | torch.get_dtype(handle, &dtype), "a tensor");
    bool fits = dim == tensor.dim && dtype == tensor.dtype;
    for (int i = 0; fits && i < dim; ++i) fits = sizes[i] == (tensor.sizes[i] < 0 ? rows : tensor.sizes[i]);
    if (fits) return;
    std::string text = std::string(tensor.name) + ": expected shape " + shape_text(tensor.dim, tensor.sizes, rows);
    text += ", got " + shape_text((int32_t)dim, sizes, rows);
    throw std::runtime_error(text + (dtype == tensor.dtype ? "" : ", of another dtype"));
}

static void call(int index, uint64_t *stack) {
    Kernel &kernel = *table[index];
    Owned owned;
    void *pointers[MOST];
    for (int i = 0; i < kernel.given; ++i) owned.keep((Handle)stack[i]);
    if (!kernel.entry) kernel.wait(index);
    if (!kernel.entry) throw std::runtime_error(kernel.problem ? kernel.problem : "a kernel has no library");
    int64_t rows = 1, *sizes;
    if (kernel.rows >= 0) {
        int64_t dim;
        check(torch.get_dim(owned.held[kernel.rows], &dim) | torch.get_sizes(owned.held[kernel.rows], &sizes), "a tensor");
        if (dim > kernel.axis) rows = sizes[kernel.axis];
    }
    for (int i = 0; i < kernel.inputs; ++i) check_input(kernel.tensors[i], owned.held[i], rows);
    for (int i = 0; i < kernel.given; ++i) {
        Handle handle = owned.held[i];
        bool contiguous;
        check(torch.is_contiguous(handle, &contiguous), "is_contiguous");
        if (!contiguous) {
            uint64_t more[2] = {(uint64_t)handle, 0};  // takes the handle over; 0: the contiguous memory format
            check(torch.call_dispatcher("aten::contiguous", "", more), "contiguous");
            handle = owned.held[i] = (Handle)more[0];
        }
        check(torch.get_data_ptr(handle, &pointers[kernel.place[i]]), "data_ptr");
    }
    Handle made[MOST];
    Owned results;
    for (int i = 0; i < kernel.made; ++i) {
        const Tensor &tensor = kernel.tensors[kernel.given + i];
        int64_t shape[4], strides[4], stride = 1;
        for (int j = tensor.dim - 1; j >= 0; --j) {
            shape[j] = tensor.sizes[j] < 0 ? rows : tensor.sizes[j];
            strides[j] = stride;
            stride *= shape[j];
        }
        check(torch.empty_strided(tensor.dim, shape, strides, tensor.dtype, 0, 0, &made[i]), "empty_strided");
        results.keep(made[i]);
        check(torch.get_data_ptr(made[i], &pointers[kernel.place[kernel.given + i]]), "data_ptr");
    }
    if (rows) kernel.entry(pointers, rows, omp_get_max_threads());
    results.count = 0;
    for (int i = 0; i < kernel.made; ++i) stack[i] = (uint64_t)made[i];
}

template <int I>
static void boxed(uint64_t *stack, uint64_t, uint64_t) {
    call(I, stack);
}

template <int... I>
static void *boxed_at(int index, std::integer_sequence<int, I...>) {
    static void (*const functions[])(uint64_t *, uint64_t, uint64_t) = {boxed<I>...};
    return (void *)functions[index];
}

}  // namespace dispatch

extern "C" int32_t places() { return dispatch::PLACES; }

extern "C" void attach(void *const *functions) { __builtin_memcpy(&dispatch::torch, functions, sizeof dispatch::torch); }

extern "C" void *place(int32_t index, dispatch::Kernel *kernel) {
    dispatch::table[index] = kernel;
    return dispatch::boxed_at(index, std::make_integer_sequence<int, dispatch::PLACES>());
}
