def find_engine():
    return None
