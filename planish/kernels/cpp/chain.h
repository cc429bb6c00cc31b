// Kernels that follow each other as one op: what passes between them lies in one piece of memory and is no tensor.
//
// The op takes `given` tensors and makes `made` of them; values of its steps are counted from the first argument on:
// arguments, results, then what lies within. All tensors with an axis M have the same M.
#include "dispatch.h"

#include <vector>

namespace chain {

using dispatch::Handle;
using dispatch::Tensor;
using dispatch::check;
using dispatch::torch;

// A kernel and the values of its border, in the border's order.
struct Step {
    void (*entry)(void *const *, int64_t, int);
    const int32_t *values;
    int32_t count;
};

// A piece of the memory within: the bytes that it needs for each row, and for any number of rows.
struct Piece {
    int64_t row, least;
};

// `checked`: arguments that are not weights, as `tensors` says; `pieces_of`: where the values within lie.
// `wait` sets the entries of all steps, then `ready`; or `problem`.
struct Chain {
    void (*wait)();
    const char *problem;
    Step *steps;
    const int32_t *checked;
    const Tensor *tensors;
    const Tensor *results;
    const Piece *pieces;
    const int32_t *piece_of;
    int32_t ready, step_count, check_count, given, made, piece_count, within, rows, axis, byte;
};

// Tensors that a call owns, let go when it ends, however it does.
struct Owned {
    std::vector<Handle> held;
    explicit Owned(int32_t count) { held.reserve(count); }
    ~Owned() {
        for (Handle handle : held) torch.delete_tensor_object(handle);
    }
};

static void *contiguous(Handle &handle) {
    bool already;
    void *pointer;
    check(torch.is_contiguous(handle, &already), "is_contiguous");
    if (!already) {
        uint64_t more[2] = {(uint64_t)handle, 0};  // takes the handle over; 0: the contiguous memory format
        check(torch.call_dispatcher("aten::contiguous", "", more), "contiguous");
        handle = (Handle)more[0];
    }
    check(torch.get_data_ptr(handle, &pointer), "data_ptr");
    return pointer;
}

static void *new_tensor(const Tensor &tensor, int64_t rows, Owned &owner) {
    int64_t shape[4], strides[4], stride = 1;
    for (int j = tensor.dim - 1; j >= 0; --j) {
        shape[j] = tensor.sizes[j] < 0 ? rows : tensor.sizes[j];
        strides[j] = stride;
        stride *= shape[j];
    }
    Handle made;
    void *pointer;
    check(torch.empty_strided(tensor.dim, shape, strides, tensor.dtype, 0, 0, &made), "empty_strided");
    owner.held.push_back(made);
    check(torch.get_data_ptr(made, &pointer), "data_ptr");
    return pointer;
}

static void call(void *place, uint64_t *stack) {
    Chain &chain = *(Chain *)place;
    Owned owned(chain.given + 1), results(chain.made);
    for (int i = 0; i < chain.given; ++i) owned.held.push_back((Handle)stack[i]);
    if (!chain.ready) chain.wait();
    if (!chain.ready) throw std::runtime_error(chain.problem ? chain.problem : "a kernel has no library");
    int64_t dim, *sizes;
    Handle first = owned.held[chain.rows];
    check(torch.get_dim(first, &dim) | torch.get_sizes(first, &sizes), "a tensor");
    int64_t rows = dim > chain.axis ? sizes[chain.axis] : 1;
    for (int i = 0; i < chain.check_count; ++i)
        dispatch::check_input(chain.tensors[i], owned.held[chain.checked[i]], rows);
    std::vector<void *> at(chain.given + chain.made + chain.within);
    for (int i = 0; i < chain.given; ++i) at[i] = contiguous(owned.held[i]);
    for (int i = 0; i < chain.made; ++i) at[chain.given + i] = new_tensor(chain.results[i], rows, results);
    std::vector<int64_t> begin(chain.piece_count + 1);
    for (int i = 0; i < chain.piece_count; ++i) {
        int64_t bytes = chain.pieces[i].row * rows;
        if (bytes < chain.pieces[i].least) bytes = chain.pieces[i].least;
        begin[i + 1] = begin[i] + (bytes + 63) / 64 * 64;
    }
    if (rows && chain.within) {
        Tensor memory = {"memory", chain.byte, 1, {begin[chain.piece_count]}};
        char *base = (char *)new_tensor(memory, rows, owned);
        for (int i = 0; i < chain.within; ++i) at[chain.given + chain.made + i] = base + begin[chain.piece_of[i]];
    }
    void *pointers[dispatch::MOST];
    for (int i = 0; rows && i < chain.step_count; ++i) {
        const Step &step = chain.steps[i];
        for (int j = 0; j < step.count; ++j) pointers[j] = at[step.values[j]];
        step.entry(pointers, rows, omp_get_max_threads());
    }
    for (int i = 0; i < chain.made; ++i) stack[i] = (uint64_t)results.held[i];
    results.held.clear();
}

}  // namespace chain

extern "C" void *place_chain(int32_t index, chain::Chain *made) { return dispatch::put(index, chain::call, made); }
