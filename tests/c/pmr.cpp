// usvm.hpp with real containers, their memory on the device in between.
#include "check.h"
#include <algorithm>
#include <cstdint>
#include <list>
#include <map>
#include <memory_resource>
#include <numeric>
#include <string>
#include <thread>
#include <unordered_map>
#include <usvm.hpp>
#include <vector>

static usvm_space_t space;

static void pmr_containers() {
    std::pmr::vector<std::uint32_t> numbers(usvm::resource());
    numbers.resize(1 << 20);
    std::iota(numbers.begin(), numbers.end(), 0u);
    usvm::check(usvm_prefetch(space, numbers.data(), numbers.size() * 4, {USVM_LOCATION_DEVICE, 0}, nullptr));
    numbers.push_back(7); // grows: reads what is on the device
    CHECK(numbers[12345] == 12345 && numbers.back() == 7);
    usvm::check(usvm_fill(space, numbers.data(), 1, 4000));
    CHECK(numbers[999] == 0x01010101u && numbers[1000] == 1000);
    std::pmr::vector<std::uint32_t> copy(numbers, usvm::resource());
    CHECK(copy == numbers);

    std::pmr::unordered_map<int, std::pmr::string> words(usvm::resource());
    for (int i = 0; i < 2000; i++)
        words.emplace(i, "a word that is too long to be kept inside: " + std::to_string(i));
    for (int i = 0; i < 2000; i += 2)
        words.erase(i);
    CHECK(words.size() == 1000 && words.at(1999).size() > 40);
    CHECK(words.at(3).get_allocator().resource() == usvm::resource());

    std::pmr::unsynchronized_pool_resource pool(usvm::resource());
    std::pmr::list<double> list(&pool);
    for (int i = 0; i < 5000; i++)
        list.push_back(i);
    CHECK(std::accumulate(list.begin(), list.end(), 0.0) == 4999.0 * 2500);

    usvm::memory_resource own;
    CHECK(own.is_equal(*usvm::resource()) && !own.is_equal(*std::pmr::new_delete_resource()));
    for (std::size_t alignment = 1; alignment <= 1 << 16; alignment *= 4) {
        void *block = own.allocate(100, alignment);
        CHECK(reinterpret_cast<std::uintptr_t>(block) % alignment == 0);
        usvm::resource()->deallocate(block, 100, alignment);
    }
}

static void allocator_containers() {
    std::vector<double, usvm::allocator<double>> numbers(1 << 18, 1.5);
    usvm::check(usvm_copy(space, numbers.data() + (1 << 17), numbers.data(), sizeof(double) << 17));
    CHECK(std::count(numbers.begin(), numbers.end(), 1.5) == 1 << 18);
    std::map<int, int, std::less<int>, usvm::allocator<std::pair<const int, int>>> map;
    for (int i = 0; i < 3000; i++)
        map[i * 7919 % 3001] = i;
    CHECK(map.size() == 3000);
    CHECK(usvm::allocator<int>() == usvm::allocator<char>());
    struct alignas(256) wide {
        char bytes[256];
    };
    std::vector<wide, usvm::allocator<wide>> wides(10);
    CHECK(reinterpret_cast<std::uintptr_t>(wides.data()) % 256 == 0);
    bool thrown = false;
    try {
        (void)usvm::allocator<wide>().allocate(SIZE_MAX / 16);
    } catch (const std::bad_alloc &) {
        thrown = true;
    }
    CHECK(thrown);
}

static void errors() {
    try {
        usvm::check(usvm_fill(space, nullptr, 1, 10));
        CHECK(!"thrown");
    } catch (const usvm::error &e) {
        CHECK(e.result() == USVM_ERROR_INVALID_ARGUMENT);
        CHECK(std::string(e.what()) == "USVM_ERROR_INVALID_ARGUMENT: dst: is NULL");
    }
    bool thrown = false;
    try {
        (void)usvm::resource()->allocate(SIZE_MAX / 2, 8);
    } catch (const std::bad_alloc &) {
        thrown = true;
    }
    CHECK(thrown);
}

int main() {
    space = open_space("vram=64M");
    pmr_containers();
    allocator_containers();
    errors();
    std::thread other(allocator_containers);
    pmr_containers();
    other.join();
    close_space(space);
    std::puts("pmr: good");
}
