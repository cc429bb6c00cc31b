// From torch's dispatcher to kernels: boxed functions of torch's stable C interface, one for each op.
//
// A kernel is `entry(pointers to its tensors, M, threads)` of a library of its own, which knows nothing of torch (one that
// reads tensors where they lie gets their strides: `Strided`). A boxed function of the stable interface has no state, so
// that there is one for each place of a table, and a place holds what a kernel's border looks like and what calls it.
// torch's functions are given as pointers: nothing is linked with it.
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
    int32_t (*get_strides)(Handle, int64_t **);
};

// A tensor of a border: sizes, -1 for M; of a kernel with strides -1, -2 .. for what `letters` stands for.
struct Tensor {
    const char *name;
    int32_t dtype, dim;
    int64_t sizes[4];
};

// A kernel. `tensors`: inputs, weights, outputs; `place`: of each in the order of the kernel's own border.
// `rows`: the tensor that has the axis `axis` of M, -1 if none. `wait` sets `entry`, or `problem` if there is no library.
struct Kernel {
    void (*entry)(void *const *, int64_t, int);
    void (*wait)();
    const char *problem;
    const Tensor *tensors;
    const int32_t *place;
    int32_t inputs, given, made, rows, axis;
};

// A kernel that reads its tensors where they lie: `entry(n, pointers, threads)` says what is wrong, if anything; n: a
// number for each of 8 letters, then 4 strides of each tensor. One tensor is made, its axes in memory in an `order`.
struct Strided {
    const char *(*entry)(const int64_t *, void *const *, int);
    void (*wait)();
    const char *problem, *name, *letters;
    const Tensor *tensors;     // given ones, then the result
    const int32_t *broadcast;  // of the given ones: axes may be missing or 1, their strides are 0
    int32_t given, order[4];
};

struct Place {
    void (*call)(void *kernel, uint64_t *stack);
    void *kernel;
};

constexpr int PLACES = 256, MOST = 64, LETTERS = 8;  // who needs more places loads a copy of the library
static Torch torch;
static Place table[PLACES];

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

static void call(void *place, uint64_t *stack) {
    Kernel &kernel = *(Kernel *)place;
    Owned owned;
    void *pointers[MOST];
    for (int i = 0; i < kernel.given; ++i) owned.keep((Handle)stack[i]);
    if (!kernel.entry) kernel.wait();
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

// A tensor's strides; the numbers that letters stand for are those of the first tensor that has them.
static void bind(const Strided &kernel, int i, Handle handle, int64_t *numbers, int64_t *strides) {
    const Tensor &tensor = kernel.tensors[i];
    int64_t dim, *sizes, *own;
    int32_t dtype;
    check(torch.get_dim(handle, &dim) | torch.get_sizes(handle, &sizes) | torch.get_dtype(handle, &dtype), "a tensor");
    check(torch.get_strides(handle, &own), "strides");
    bool loose = kernel.broadcast[i];
    bool fits = dtype == tensor.dtype && (loose ? dim <= tensor.dim : dim == tensor.dim);
    int64_t missing = tensor.dim - dim;
    for (int j = 0; fits && j < tensor.dim; ++j) {
        int64_t size = j < missing ? 1 : sizes[j - missing], wanted = tensor.sizes[j];
        if (wanted < 0) {
            int64_t &number = numbers[-1 - wanted];
            wanted = number < 0 && !loose ? number = size : number;
        }
        strides[j] = j < missing || (loose && size == 1) ? 0 : own[j - missing];
        fits = size == wanted || (loose && size == 1);
    }
    if (fits) return;
    std::string text = std::string(kernel.name) + ": " + tensor.name + ": expected shape [", got = "[";
    for (int j = 0; j < tensor.dim; ++j) {
        int64_t wanted = tensor.sizes[j];
        bool open = wanted < 0 && numbers[-1 - wanted] < 0;
        std::string shown = open ? std::string(1, kernel.letters[-1 - wanted])
                                 : std::to_string(wanted < 0 ? numbers[-1 - wanted] : wanted);
        text += (j ? ", " : "") + shown;
    }
    for (int j = 0; j < dim; ++j) got += (j ? ", " : "") + std::to_string(sizes[j]);
    throw std::runtime_error(text + "], got " + got + "]" + (dtype == tensor.dtype ? "" : ", of another dtype"));
}

static void call_strided(void *place, uint64_t *stack) {
    Strided &kernel = *(Strided *)place;
    Owned owned;
    void *pointers[MOST];
    int64_t n[LETTERS + 4 * MOST];
    for (int i = 0; i < kernel.given; ++i) owned.keep((Handle)stack[i]);
    if (!kernel.entry) kernel.wait();
    if (!kernel.entry) throw std::runtime_error(kernel.problem ? kernel.problem : "a kernel has no library");
    for (int i = 0; i < LETTERS; ++i) n[i] = -1;
    for (int i = 0; i < kernel.given; ++i) {
        int64_t *strides = n + LETTERS + 4 * i;
        int last = kernel.tensors[i].dim - 1;
        bind(kernel, i, owned.held[i], n, strides);
        if (strides[last] > 1 && !kernel.broadcast[i]) {  // rows are read as vectors
            uint64_t more[2] = {(uint64_t)owned.held[i], 0};
            check(torch.call_dispatcher("aten::contiguous", "", more), "contiguous");
            owned.held[i] = (Handle)more[0];
            bind(kernel, i, owned.held[i], n, strides);
        }
        check(torch.get_data_ptr(owned.held[i], &pointers[i]), "data_ptr");
    }
    const Tensor &tensor = kernel.tensors[kernel.given];
    int64_t shape[4], *strides = n + LETTERS + 4 * kernel.given, stride = 1;
    for (int j = 0; j < tensor.dim; ++j) shape[j] = tensor.sizes[j] < 0 ? n[-1 - tensor.sizes[j]] : tensor.sizes[j];
    for (int j = tensor.dim - 1; j >= 0; --j) {
        strides[kernel.order[j]] = stride;
        stride *= shape[kernel.order[j]];
    }
    Owned results;
    Handle made;
    check(torch.empty_strided(tensor.dim, shape, strides, tensor.dtype, 0, 0, &made), "empty_strided");
    results.keep(made);
    check(torch.get_data_ptr(made, &pointers[kernel.given]), "data_ptr");
    const char *problem = kernel.entry(n, pointers, omp_get_max_threads());
    if (problem) throw std::runtime_error(std::string(kernel.name) + ": " + problem);
    results.count = 0;
    stack[0] = (uint64_t)made;
}

template <int I>
static void boxed(uint64_t *stack, uint64_t, uint64_t) {
    table[I].call(table[I].kernel, stack);
}

template <int... I>
static void *boxed_at(int index, std::integer_sequence<int, I...>) {
    static void (*const functions[])(uint64_t *, uint64_t, uint64_t) = {boxed<I>...};
    return (void *)functions[index];
}

// The boxed function of a place, which calls `kernel` by `call` from now on.
static void *put(int32_t index, void (*call)(void *, uint64_t *), void *kernel) {
    table[index] = Place{call, kernel};
    return boxed_at(index, std::make_integer_sequence<int, PLACES>());
}

}  // namespace dispatch

extern "C" int32_t places() { return dispatch::PLACES; }

extern "C" void attach(void *const *functions) { __builtin_memcpy(&dispatch::torch, functions, sizeof dispatch::torch); }

extern "C" void *place(int32_t index, dispatch::Kernel *kernel) { return dispatch::put(index, dispatch::call, kernel); }

extern "C" void *place_strided(int32_t index, dispatch::Strided *kernel) {
    return dispatch::put(index, dispatch::call_strided, kernel);
}
