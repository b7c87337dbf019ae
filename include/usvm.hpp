/*
 * usvm for C++17: errors as exceptions, a std::pmr::memory_resource and an allocator.
 *
 *     std::pmr::vector<float> numbers(1 << 20, usvm::resource());
 *     std::vector<float, usvm::allocator<float>> others(1 << 20);
 *     usvm::check(usvm_fill(space, numbers.data(), 0, numbers.size() * sizeof(float)));
 *
 * Memory comes from usvm_aligned_alloc: large blocks share no page with others. Needs no usvm_init.
 */
#ifndef USVM_HPP
#define USVM_HPP

#include <cstddef>
#include <limits>
#include <memory_resource>
#include <new>
#include <stdexcept>
#include <string>

#include <usvm.h>

namespace usvm {

/** A call that failed: what() is the message that names the argument. */
class error : public std::runtime_error {
public:
    error(usvm_result_t result, const std::string &message)
        : std::runtime_error(std::string(usvm_result_name(result)) + ": " + message), result_(result) {}

    usvm_result_t result() const noexcept { return result_; }

private:
    usvm_result_t result_;
};

/** Throws usvm::error unless result is USVM_SUCCESS. On the thread that made the call. */
inline void check(usvm_result_t result) {
    if (result == USVM_SUCCESS)
        return;
    const char *message = "";
    usvm_last_error(&message, nullptr);
    throw error(result, message);
}

/** Memory that is meant to migrate. All resources of this kind are equal. */
class memory_resource : public std::pmr::memory_resource {
    void *do_allocate(std::size_t bytes, std::size_t alignment) override {
        if (void *block = usvm_aligned_alloc(alignment, bytes))
            return block;
        throw std::bad_alloc();
    }

    void do_deallocate(void *block, std::size_t, std::size_t) override { usvm_free(block); }

    bool do_is_equal(const std::pmr::memory_resource &other) const noexcept override {
        return dynamic_cast<const memory_resource *>(&other) != nullptr;
    }
};

/** The process's memory_resource. It is never destroyed, so containers may outlive main. */
inline memory_resource *resource() noexcept {
    alignas(memory_resource) static unsigned char place[sizeof(memory_resource)];
    static memory_resource *const made = new (place) memory_resource;
    return made;
}

/** The same for containers that take an allocator. */
template <class T> class allocator {
public:
    using value_type = T;

    allocator() noexcept = default;
    template <class U> allocator(const allocator<U> &) noexcept {}

    T *allocate(std::size_t n) {
        if (n > std::numeric_limits<std::size_t>::max() / sizeof(T))
            throw std::bad_array_new_length();
        if (void *block = usvm_aligned_alloc(alignof(T), n * sizeof(T)))
            return static_cast<T *>(block);
        throw std::bad_alloc();
    }

    void deallocate(T *block, std::size_t) noexcept { usvm_free(block); }

    template <class U> bool operator==(const allocator<U> &) const noexcept { return true; }
    template <class U> bool operator!=(const allocator<U> &) const noexcept { return false; }
};

} // namespace usvm

#endif /* USVM_HPP */
